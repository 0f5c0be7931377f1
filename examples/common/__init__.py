"""What the trainers have in common: data, nets, losses, options, the loop."""

from importlib import import_module

for _package in ("matplotlib", "PIL", "tqdm"):
    try:
        import_module(_package)
    except ImportError as error:
        raise ImportError(f'{error}. The examples need: pip install "mtprune[examples]"') from error
