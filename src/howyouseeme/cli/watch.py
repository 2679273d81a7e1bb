"""`howyouseeme watch`: a video, explained frame by frame."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .network import Asked, network_options
from .photos import out_option
from .program import verbose_option
from .question import Question, one_question_options
from .videos import go_through, refuse_photo, table_in, video_argument, writer_in

if TYPE_CHECKING:
    import numpy as np

    from ..explanation import Explanation


@click.command()
@video_argument
@one_question_options
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Explain every Nth frame and leave the others out: N times as fast.",
)
@network_options
@out_option("the table and the video")
@verbose_option
def watch(*, source: str, question: Question, every: int, asked: Asked, out: Path) -> None:
    """Explain the frames of a video, of a folder of frames, or of a webcam (webcam, webcam:1).

    Writes a table of the answers (CSV) and the video under what answers for them; for a folder, frames.
    """
    refuse_photo(source)
    from ..video import open_video  # noqa: PLC0415
    from ..watch import COLUMNS, Moment  # noqa: PLC0415
    from ..watch import watch as look  # noqa: PLC0415

    with open_video(source) as video:
        network = asked.load()
        wanted = question.wanted(network)
        if wanted.top is not None:
            raise click.UsageError(f"--target {question.target}: name one class to watch.")
        explainer = question.explainer(network)

        def explain(frame: np.ndarray) -> Explanation:
            return wanted.explained(explainer, frame)[0]

        table = table_in(out, source, ".watch")
        rate = None if video.rate is None else video.rate / every
        picture = writer_in(out, source, ".watch", rate, table, COLUMNS)
        answers: Counter[str] = Counter()
        problems: list[Moment] = []

        def note(moment: Moment) -> None:
            if moment.explanation is None:
                problems.append(moment)
            else:
                answers[moment.label] += 1

        def finish() -> None:
            picture.drop_later()
            often = ", ".join(f"{label} ({count})" for label, count in answers.most_common(3))
            told = f"{answers.total()} of {answers.total() + len(problems)} frames explained"
            click.echo(f"{source} → {told}: {often or 'none'} → {table}, {picture.path}")
            if problems:
                first = problems[0]
                click.echo(f"{source}: frame {first.number}: {first.problem}", err=True)

        steps = look(video, explain, table, picture, every)
        go_through(steps, video, "Explaining", note, finish, every)
        if problems:
            raise click.exceptions.Exit(1)
