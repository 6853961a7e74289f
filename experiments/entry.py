"""What every entry point shares: Hydra around it, errors as sentences, the compilation cache."""

import functools
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import hydra
import jax
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.text import Text

from experiments import configuration, dry_run, memory, sweeps
from experiments.checkpoints.packages import cache_folder
from experiments.configuration import CONF, did_you_mean
from experiments.errors import UserError
from experiments.progress import console


def entry_point(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `run(config)` a command configured by conf/<name>.yaml."""

    def decorate(run: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def body(config: DictConfig) -> None:  # knows but the name: launchers pickle it
            _run(name, config)

        body.__module__ = f"experiments.{name}"  # what Hydra names the job by
        command = hydra.main(version_base="1.3", config_path=CONF, config_name=name)(body)

        @functools.wraps(run)
        def main() -> None:
            guarded(configuration.check)(name, sys.argv[1:])
            try:
                command()
            finally:
                complete = [sweeps.summarize(folder) for folder in sweeps.started]
            if not all(complete):
                sys.exit(1)

        return main  # with `run` as its __wrapped__

    return decorate


def _run(name: str, config: DictConfig) -> None:
    """One job of a command, in whichever process the launcher put it."""
    prepare()
    module = importlib.import_module(f"experiments.{name}")
    work = functools.partial(module.main.__wrapped__, config)
    if config.get("dry_run"):
        jax.config.update("jax_platforms", "cpu")  # an accelerator is left alone
        work = functools.partial(dry_run.show, name, config, getattr(module, "prepare", None))
    if sweeps.is_job():
        sweeps.job(work)
    else:
        guarded(work)()


def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with a UserError printed as its sentence (exit status 1) and Ctrl-C quiet (130)."""

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        try:
            return run(*arguments)
        except UserError as error:
            console.print("[bold red]error:[/]", Text(str(error)), soft_wrap=True)
            sys.exit(1)
        except KeyboardInterrupt:
            console.print("interrupted: run the same command again to go on.")
            sys.exit(130)

    return call


def prepare() -> None:
    """Quiet libraries, memory that is reused, and compiled functions kept between runs. Products of
    float32 are that on every device: a GPU's default rounds to TF32's 10 bits, and what is solved
    from Hessians would not be what a record says.
    """
    memory.keep_freed()
    memory.drop_programs()
    for library in ("absl", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if "JAX_DEFAULT_MATMUL_PRECISION" not in os.environ:
        jax.config.update("jax_default_matmul_precision", "highest")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def build(config: DictConfig, key: str) -> Any:
    """Instantiate config[key] by its `_target_`; its own complaint becomes a UserError."""
    try:
        return hydra.utils.instantiate(config[key])
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        reason = cause if isinstance(cause, (ValueError, TypeError)) else error
        raise UserError(f"{key}: {_plainly(reason, config[key])}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error


def _plainly(reason: Exception, node: DictConfig) -> str:
    """An unknown setting by its name, with what was probably meant; else the reason as it is."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(reason))
    if not match:
        return str(reason)
    others = [str(key) for key in node if key != match[1] and not str(key).startswith("_")]
    return f"{node['_target_']} has no setting {match[1]}{did_you_mean(match[1], others)}"


def resolved(config: DictConfig) -> dict[str, Any]:
    """The config as plain data, every interpolation resolved; a missing value is a UserError."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{str(error).splitlines()[0]}: give it a value.") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
