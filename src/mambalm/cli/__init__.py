"""The sub-commands of `mambalm`, one file each; `mambalm_cli` lists them and imports them when called."""
