"""vlmattn track: where the camera was, frame by frame, of a folder, a video, or a rendered room."""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlmattn.cli.benchmark import check_target, find_device
from vlmattn.cli.common import app, console, errors, plain
from vlmattn.errors import InputError, OptionError
from vlmattn.evals.loading import check_dtype
from vlmattn.files import write_whole

if TYPE_CHECKING:
    from vlmattn.tracking import Frames, Rule, Track, Tracker, Trajectory
    from vlmattn.tracking.controls import Score, Walk

_DEMO = Path("runs/track-demo")
_SIZE = 308  # longer side for networks that come without a size: KV-Tracker's live setting
_ROUNDS = 9  # of the paired timing in the demo
_TOLD = {  # fields of a score
    "ate": "ATE, Sim(3)",
    "ate_rigid": "ATE, rigid",
    "rpe": "RPE",
    "rpe_degrees": "RPE, degrees",
    "yaw": "yaw, degrees",
}

Source = Annotated[Path | None, typer.Option(help="Folder of pictures, a video (needs PyAV), or a GIF.")]
Out = Annotated[Path | None, typer.Option(help="Trajectory in the TUM format: time tx ty tz qx qy qz qw per line.")]
Viz = Annotated[Path | None, typer.Option(help="HTML page: path from above, confidence, keyframes.")]
Ply = Annotated[Path | None, typer.Option(help="Point cloud of the keyframes.")]
Model = Annotated[str, typer.Option(help="'embedded', or what --network's from_pretrained takes.")]
Network = Annotated[str | None, typer.Option(help="Class of the model, package.module:Class, e.g. pi3.models.pi3:Pi3.")]
RuleName = Annotated[
    str | None,
    typer.Option(
        help="When to take a keyframe: angular, azel, released, interval, pose. Default: angular; --demo: pose."
    ),
]
Degrees = Annotated[float | None, typer.Option(help="For angular, azel, released, pose: angle (10).")]
IntervalOf = Annotated[int | None, typer.Option(help="For interval: frames (50).")]
Most = Annotated[int, typer.Option(help="The map takes no more.")]
Every = Annotated[int, typer.Option(help="Take each n-th frame.")]
Rate = Annotated[float | None, typer.Option(help="Frames per second, where the source does not say (30).")]
Size = Annotated[int | None, typer.Option(help="Longer side in pixels; default: the network's, or 308.", min=1)]
Masks = Annotated[Path | None, typer.Option(help="Folder of masks of an object, named as the frames; white is on it.")]
Truth = Annotated[Path | None, typer.Option(help="True trajectory (TUM format): tells ATE and RPE.")]
CacheDType = Annotated[str, typer.Option(help="Of the map: auto, float32, bfloat16 or float16.")]
DType = Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: a GPU if there is one.")]
Demo = Annotated[bool, typer.Option("--demo", help="Render a room and track it, with controls beside.")]
Seed = Annotated[int, typer.Option(help="Which room of the demo.", min=0)]


@app.command()
def track(
    frames: Source = None,
    out: Out = None,
    viz: Viz = None,
    ply: Ply = None,
    model: Model = "embedded",
    network: Network = None,
    rule: RuleName = None,
    degrees: Degrees = None,
    interval: IntervalOf = None,
    max_keyframes: Most = 20,
    every: Every = 1,
    rate: Rate = None,
    size: Size = None,
    masks: Masks = None,
    truth: Truth = None,
    cache_dtype: CacheDType = "auto",
    dtype: DType = "auto",
    device: Device = None,
    demo: Demo = False,
    seed: Seed = 0,
) -> None:
    """Track the camera of a sequence against the keys and values of a map of keyframes.

    Examples:

      [bold]vlmattn track --demo[/bold]

      [bold]vlmattn track --frames walk/ --out walk.txt --viz walk.html[/bold]

      [bold]vlmattn track --frames walk.mp4 --out walk.txt --model yyfz233/Pi3 --network pi3.models.pi3:Pi3[/bold]
    """
    if demo == (frames is not None):
        raise OptionError("give --frames with a folder or video, or --demo" + (", not both" if demo else ""))
    if demo and (truth or masks):
        raise OptionError("--demo renders its own frames and knows their truth; leave out --truth and --masks")
    settings = _Settings(model, network, dtype, find_device(device), cache_dtype, max_keyframes)
    chosen = _rule(rule or ("pose" if demo else "angular"), degrees, interval)
    if frames is None:
        files = _Files(out or _DEMO / "trajectory.txt", viz or _DEMO / "page.html", ply)
        files.check()
        _demo(settings.tracker(chosen), seed, files)
    elif out is None:
        raise OptionError("give --out with a file name for the trajectory")
    else:
        files = _Files(out, viz, ply)
        files.check()
        from vlmattn.tracking import Frames, read_tum

        source, real = Frames(frames, every, rate), None if truth is None else read_tum(truth)
        _sequence(settings.tracker(chosen), source, frames.name, size, masks, real, files)


@dataclass(frozen=True)
class _Settings:
    """Which network runs how."""

    model: str
    network: str | None
    dtype: str
    device: str
    cache_dtype: str
    max_keyframes: int

    def tracker(self, rule: Rule) -> Tracker:
        from vlmattn.tracking import Tracker

        dtype, cache_dtype = _dtype(self.dtype), _dtype(self.cache_dtype)
        model = self._load().eval().to(device=self.device, dtype=dtype)
        return Tracker(model, rule=rule, max_keyframes=self.max_keyframes, cache_dtype=cache_dtype)

    def _load(self) -> Any:
        import torch

        from vlmattn.tracking.bundled import load

        if self.network is None:
            if self.device == "cpu" and self.model == "embedded":
                torch.set_num_threads(1)  # so small that threads would mostly wait for each other
            return load() if self.model == "embedded" else load(self.model)
        module, _, attribute = self.network.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute).from_pretrained(self.model)
        except (ImportError, AttributeError, ValueError) as error:
            why = f"--network {self.network} cannot be imported ({error}); it is package.module:Class"
            raise OptionError(why) from error
        except OSError as error:
            raise InputError(f"cannot load '{self.model}': {str(error).strip().splitlines()[0]}") from error


def _dtype(name: str) -> Any:
    import torch

    check_dtype(name)
    return None if name == "auto" else getattr(torch, name)


@dataclass(frozen=True)
class _Files:
    """What is written."""

    out: Path
    viz: Path | None
    ply: Path | None

    def check(self) -> None:
        for target in filter(None, (self.out, self.viz, self.ply)):
            check_target(target)

    def write(self, tracker: Tracker, tracks: Sequence[Track], title: str, truth: Any, extra: str) -> None:
        from vlmattn.tracking.page import page

        tracker.save_tum(self.out)
        plain(f"trajectory: {self.out}")
        if self.ply is not None:
            tracker.save_ply(self.ply)
            plain(f"points: {self.ply}")
        if self.viz is not None:
            write_whole(self.viz, page(tracker, tracks, title, truth, extra))
            plain(f"page: {self.viz}")


def _rule(name: str, degrees: float | None, interval: int | None) -> Rule:
    from vlmattn.tracking.keyframes import Interval, find_rule

    rule = find_rule(name)
    option, odd = ("--degrees", degrees) if isinstance(rule, Interval) else ("--interval", interval)
    if odd is not None:
        raise OptionError(f"{option} means nothing to --rule {name}")
    given = {"degrees": degrees, "frames": interval}
    return replace(rule, **{name: value for name, value in given.items() if value is not None})  # type: ignore[type-var]


def _sequence(
    tracker: Tracker,
    source: Frames,
    title: str,
    size: int | None,
    masks: Path | None,
    truth: Trajectory | None,
    files: _Files,
) -> None:
    """Track all frames of a source and write what was asked for."""
    tracks, times = _follow(tracker, _prepared(tracker, source, size, masks), len(source))
    if not tracks:
        raise InputError("the source has no frames")
    extra, drawn = ("", None) if truth is None else _against(tracker, truth)
    files.write(tracker, tracks, title, drawn, extra)
    plain(f"{len(tracks)} frames, {tracker.keyframes} keyframes, {len(tracks) / sum(times):.1f} frames per second")


def _prepared(
    tracker: Tracker, source: Frames, size: int | None, masks: Path | None
) -> Iterator[tuple[Any, Any, float]]:
    """Pictures of the network's size, masks, and seconds."""
    from vlmattn.pictures import open_picture
    from vlmattn.tracking import fit

    longest = size or getattr(getattr(tracker.model, "config", None), "image_size", _SIZE)
    for frame in source:
        picture, mask = fit(frame.picture, longest, tracker.adapter.multiple), None
        if masks is not None:
            mask = open_picture(masks / f"{Path(frame.name).stem}.png").resize(picture.size, resample=0)
        yield picture, mask, frame.seconds


def _follow(
    tracker: Tracker, frames: Iterable[tuple[Any, Any, float | None]], total: int
) -> tuple[list[Track], list[float]]:
    """Track frames (picture, mask, seconds); and the seconds that each took."""
    tracks: list[Track] = []
    times: list[float] = []
    with _progress(total, "tracking") as bar:
        for picture, mask, seconds in frames:
            begun = time.perf_counter()
            tracks.append(tracker.follow(picture, mask, seconds))
            times.append(time.perf_counter() - begun)
            bar.set_postfix_str(f"{tracker.keyframes} keyframes")
            bar.update()
    return tracks, times


def _progress(total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total or None, desc=what, unit=" frames", leave=False, disable=None, file=sys.stderr)


def _against(tracker: Tracker, real: Trajectory) -> tuple[str, Any]:
    """Errors against the truth as HTML or a note why there are none, and the true poses if every frame has one."""
    from vlmattn.tracking.controls import score
    from vlmattn.tracking.metrics import associate

    told = tracker.trajectory
    if not real.ascending:
        _note(
            "the times of the truth repeat or go back (two runs in one file?); its poses are taken in the order of"
            " the file"
        )
    try:
        here, there = associate(told.times, real.times)
        scored = {"tracked": score(told.poses[here], real.poses[there])}
    except InputError as error:  # the trajectory is written all the same
        _note(f"not compared with the truth: {error}")
        return "", None
    _show(f"{len(here)} of {len(told)} frames have a true pose", scored)
    return _html(scored), real.poses[there] if len(here) == len(told) else None


def _note(text: str) -> None:
    errors.print(f"note: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def _demo(tracker: Tracker, seed: int, files: _Files) -> None:
    """Track a walk through a room that training never saw; the same frames by other ways; what a frame takes."""
    from vlmattn.tracking.controls import compare, held_out_walk, score
    from vlmattn.tracking.files import Trajectory, write_tum

    walk, other = held_out_walk(seed), held_out_walk(seed + 1_000)
    tracks, times = _follow(tracker, ((image, None, None) for image in walk.images), len(walk.images))
    keyframes = [number for number, track in enumerate(tracks) if track.keyframe]
    if len(keyframes) < 2:
        raise OptionError(f"the rule took {len(keyframes)} keyframe; take one that asks for more, such as --degrees 5")
    queries = [number for number in range(len(tracks)) if number not in keyframes]
    with _progress(len(queries), "full passes") as bar:
        ways = compare(tracker.model, walk, other, keyframes, queries, tick=bar.update)
    live = {"live": score(tracker.trajectory.poses, walk.poses)}
    scored = {name: score(poses, walk.poses[queries]) for name, poses in ways.items()}
    speed = _speed(tracker.model, walk, keyframes, times, queries)
    console.print(f"A room that training never saw (seed {seed}): {len(tracks)} frames, {len(keyframes)} keyframes.")
    _show("Live, with the map growing, all frames", live)
    _show("The frames between, against the finished map", scored)
    for line in speed:
        plain(line)
    _note_gate()
    write_tum(files.out.with_name("truth.txt"), Trajectory(tracker.trajectory.times, walk.poses))
    lines = "".join(f"<li>{line}</li>" for line in speed)
    extra = f"{_html({**live, **scored})}<h2>Speed</h2><ul>{lines}</ul>"
    files.write(tracker, tracks, f"A rendered room (seed {seed})", walk.poses, extra)


def _note_gate() -> None:
    """What must be said of the bundled network, if it did not pass the gate of its training."""
    from vlmattn.tracking.bundled import figures

    told = figures()["gate"]
    if not told["passed"]:
        _note(
            f"the bundled network is an untrained demo: with the right map it makes {told['yaw']['ratio']:.2f} (yaw)"
            f" and {told['ate']['ratio']:.2f} (ATE) of the errors that it makes with another room's; below 0.5 was"
            " asked of both"
        )


def _speed(
    model: Any, walk: Walk, keyframes: Sequence[int], times: Sequence[float], queries: Sequence[int]
) -> list[str]:
    """Paired: the same frame cached and in a full pass; and what the live run took with all its maps."""
    import torch

    from vlmattn.evals.timing import paired, quartiles
    from vlmattn.tracking.controls import make_map

    tracker = make_map(model, walk.images, keyframes)
    assert tracker.map is not None
    frame = walk.images[queries[0]]
    every = torch.cat([tracker.map.images, frame[None]])[None]

    def full() -> None:
        with torch.no_grad():
            tracker.adapter.forward(every, reading=False)

    seconds = paired({"cached": lambda: tracker.track(frame), "full": full}, _ROUNDS)
    ratios = [full / cached for cached, full in zip(seconds["cached"], seconds["full"], strict=True)]
    low, middle, high = quartiles(ratios)
    cached, whole = (statistics.median(seconds[name]) * 1e3 for name in ("cached", "full"))
    kept = tracker.map.cache_bytes / 2**20
    return [
        f"a frame against {len(keyframes)} keyframes: {cached:.1f} ms cached, {whole:.1f} ms in a full pass:"
        f" {middle:.1f}x [{low:.1f}, {high:.1f}], n = {_ROUNDS}",
        f"the live run with all its maps: {sum(times):.2f} s for {len(times)} frames, {len(times) / sum(times):.0f}"
        f" per second ({whole * len(times) / 1e3 / sum(times):.1f}x a full pass for each frame)",
        f"keys and values of the map: {kept:.2f} MiB, {kept / len(keyframes):.3f} MiB per keyframe",
    ]


def _show(title: str, scored: dict[str, Score]) -> None:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("")
    for heading in _TOLD.values():
        table.add_column(heading, justify="right")
    for name, value in scored.items():
        table.add_row(name, *(f"{getattr(value, field.name):.3f}" for field in fields(value)))
    console.print(table)


def _html(scored: dict[str, Score]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in _TOLD.values())
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{getattr(value, key):.3f}</td>' for key in _TOLD)}</tr>"
        for name, value in scored.items()
    )
    return (
        "<h2>Errors</h2><div"
        f" class='wide'><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div><p>RMSE of"
        " the camera centres (ATE) and of the steps between tracked frames (RPE) in the unit of the truth; yaw is the"
        " mean error of the heading. One alignment of the whole path; its seven degrees of freedom forgive much, so"
        " errors mean something only beside those of the wrong map.</p>"
    )
