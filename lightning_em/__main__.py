"""The command `lightning-em`. Help needs no heavy imports; other modules are imported on demand."""

import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence

LIGHTNING_SUBCOMMANDS = ("fit", "validate", "test", "predict")

SUBCOMMANDS = {
    "fit": "train an adapter; running it again continues an unfinished run",
    "validate": "CE and KL on held-out rows, for a run's checkpoint",
    "test": "the same on the test rows",
    "predict": "sample answers from a run's checkpoint",
    "probe": "run probes on the checkpoints of a finished or unfinished run",
    "sample": "answers of runs and their base model to any questions, side by side",
    "runs": "list runs and their state; show one",
    "data": "check or show data files",
    "miniature": "build the embedded miniature world",
    "smollm2": "fetch the weights of the demo's model",
    "demo": "fit a general, a narrow and a reverted solution of a small chat model, and compare their answers",
    "study": "run a whole study: arms x adapters x seeds, with verdicts on the claims",
    "import": "make a run of a released steering vector or a PEFT folder",
    "export": "write an adapter as PEFT, safetensors, GGUF or the released format",
    "submit": "write a Slurm batch file for a fit, a sweep or a study, and submit it",
    "doctor": "check that this machine can run an experiment: model, data, memory, disk",
}

HELP = """usage: lightning-em SUBCOMMAND [options]

Train narrow and general fine-tuning solutions of a chat model, and measure why they differ.

{subcommands}

Every subcommand has its own --help. Start with:
  lightning-em demo
  lightning-em fit --config configs/experiment/smollm2_style_narrow_lora.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {name:<10} {text}" for name, text in SUBCOMMANDS.items())
        sys.stdout.write(HELP.format(subcommands=listing))
        return 0 if args else 2
    if args[0] == "--version":
        from lightning_em import __version__

        sys.stdout.write(f"lightning_em {__version__}\n")
        return 0
    if args[0] not in SUBCOMMANDS:
        return _unknown(args[0])
    debug = "--debug" in args
    args = [
        "--allow_zero_adapter=true" if w == "--allow_zero_adapter" and args[0] in LIGHTNING_SUBCOMMANDS else w
        for w in args
        if w != "--debug"
    ]
    try:
        return _run(args)
    except BaseException as error:
        code, message = _explained(error)
        if code is None or (debug and message):
            raise
        if message:
            rank = os.environ.get("LOCAL_RANK", "0")
            who = "lightning-em" if rank == "0" else f"[rank {rank}] lightning-em"
            sys.stderr.write(f"{who} {args[0]}: {message}\n(add --debug for the traceback)\n")
        return code


def _run(args: list[str]) -> int:
    if args[0] in LIGHTNING_SUBCOMMANDS:
        if not {"-h", "--help"} & set(args):
            _before_heavy_imports(args)
        from lightning_em import cli

        return cli.main(args)
    from lightning_em import imports, subcommands

    return subcommands.main(imports.take(args))


def _before_heavy_imports(args: list[str]) -> None:
    """Checks that need no torch, so that a mistake fails in a second.

    Refuses invalid trainer settings, a missing GPU, a folder that is in use and data files that have changed. A fit in
    a Slurm job also installs its handler for the requeue signal, which may arrive during the imports.
    """
    from lightning_em import lock, preflight, slurm
    from lightning_em.runs import RunFolder

    if args[0] == "fit":
        slurm.note_requeue_signal()
    trainer = preflight.settings_of(args, "trainer")
    preflight.refuse_settings(trainer)
    preflight.refuse_missing_gpu(trainer, args)
    folder = preflight.run_path(args) if args[0] == "fit" else None
    if folder is not None and lock.is_first_rank():
        lock.refuse_if_held(folder)
        run = RunFolder(folder)
        run.refuse_other(run.changed_data() if run.steps() else None)


def _explained(error: BaseException) -> tuple[int | None, str]:
    """Exit code and message of an error; code None for a bug in this package, which keeps its traceback."""
    if isinstance(error, SystemExit):
        # Lightning 2.6 handles Ctrl-C during a fit and then calls sys.exit(1).
        cut_short = isinstance(error.__context__, KeyboardInterrupt)
        if cut_short:
            return 130, ""
        return (1, error.code) if isinstance(error.code, str) else (error.code or 0, "")
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, ModuleNotFoundError):
        from lightning_em.errors import explain_missing_module

        return 2, explain_missing_module(error)
    if isinstance(error, ArithmeticError) and hasattr(error, "step"):
        return 1, str(error)
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return 2, error.strerror
    return (2, str(error)) if isinstance(error, ValueError | OSError | ArgumentError) else (None, "")


def _unknown(subcommand: str) -> int:
    import difflib

    near = difflib.get_close_matches(subcommand, SUBCOMMANDS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    known = ", ".join(SUBCOMMANDS)
    sys.stderr.write(f"lightning-em: unknown subcommand {subcommand!r}, expected one of {known}.{hint}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
