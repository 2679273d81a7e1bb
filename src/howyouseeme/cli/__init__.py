"""The command line, a command a module.

Only click is imported at first: torch, numpy, pillow and matplotlib take seconds, and `--help`,
`--version` and a mistyped option shall not wait for them.
"""

from __future__ import annotations

from . import detect, evaluate, explain, lists, propose, serve, track, watch
from .program import main

__all__ = ["main"]

for _command in (
    explain.explain,
    detect.detect,
    track.track,
    watch.watch,
    propose.propose,
    serve.serve,
    evaluate.evaluate,
    explain.demo,
    lists.models,
    lists.classes,
):
    main.add_command(_command)
