"""The program `p2pmodel`, which `python -m p2pmodel` is too: its commands are imported once Ctrl-C is looked after."""

import sys


def main() -> None:
    """Ctrl-C ends it with status 130 and no traceback, while modules are still being imported too."""
    try:
        from p2pmodel.cli.app import main as command

        command()
    except (KeyboardInterrupt, Exception) as error:
        if not _is_interrupt(error):
            raise
        sys.exit(130)


def _is_interrupt(error: BaseException | None) -> bool:
    """Or what a library that was being imported has made of one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
