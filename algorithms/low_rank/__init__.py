"""Corrections of low rank around any one-shot method, one file per paper."""
