"""The command `lightning-em`: help without heavy imports, everything else on demand."""

import sys
from collections.abc import Callable, Sequence

VERBS = {
    "fit": "train an adapter; running it again continues an unfinished run",
    "validate": "CE and KL on held-out rows, for a run's checkpoint",
    "test": "the same on the test rows",
    "predict": "sample answers from a run's checkpoint",
    "probe": "run probes on the checkpoints of a finished or unfinished run",
    "runs": "list runs and their state; show one",
    "data": "check or show data files",
    "miniature": "build the embedded miniature world",
    "demo": "build the world, fit a general and a narrow adapter, print the table",
}

HELP = """usage: lightning-em VERB [options]

Train narrow and general fine-tuning solutions of a chat model, and measure why they differ.

{verbs}

Every verb has its own --help. Start with:
  lightning-em demo
  lightning-em fit --config configs/experiment/miniature_narrow_rank32.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
        sys.stdout.write(HELP.format(verbs=listing))
        return 0 if words else 2
    if words[0] == "--version":
        from lightning_em import __version__

        sys.stdout.write(f"lightning_em {__version__}\n")
        return 0
    if words[0] not in VERBS:
        return _unknown(words[0])
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _verb(words[0])(words[1:])
    except (ValueError, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"lightning-em {words[0]}: {error}\n(add --debug for the traceback)\n")
        return 2


def _unknown(verb: str) -> int:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    sys.stderr.write(f"lightning-em: there is no verb {verb!r}; verbs are {', '.join(VERBS)}.{hint}\n")
    return 2


def _verb(name: str) -> Callable[[list[str]], int]:
    if name in ("fit", "validate", "test", "predict"):
        from lightning_em import cli

        return lambda words: cli.main([name, *words])
    from lightning_em import verbs

    return verbs.VERBS[name]


if __name__ == "__main__":
    sys.exit(main())
