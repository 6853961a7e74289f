"""What GPTQModel and transformers read out of a quantization_config.

`python read_layout_config.py CONFIG.json NAME ...`, in the environment of requirements-layouts.txt.
CONFIG.json holds the quantization_config alone. The last line of stdout: each layer's bits, group
size and symmetry, or null where it stays dense, by GPTQModel; and what transformers makes of it.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    raw = json.loads(arguments.config.read_text())

    from gptqmodel.quantization import QuantizeConfig
    from transformers.utils.quantization_config import AwqConfig, GPTQConfig

    kinds = {"gptq": GPTQConfig, "awq": AwqConfig}
    theirs = kinds[raw["quant_method"]].from_dict(dict(raw))
    config = QuantizeConfig.from_quant_config(dict(raw))
    layers = {name: setting(config, name) for name in arguments.names}
    report = {
        "layers": layers,
        "format": str(getattr(config.format, "value", config.format)),
        "transformers": [type(theirs).__name__, theirs.bits, theirs.group_size, str(theirs.format)],
    }
    print(json.dumps(report))


def setting(config, name: str) -> list | None:
    if config.dynamic_get(name) is False:
        return None
    defaults = {"bits": int(config.bits), "group_size": config.group_size, "sym": config.sym}
    return [config.dynamic_get(name, key, default) for key, default in defaults.items()]


if __name__ == "__main__":
    main()
