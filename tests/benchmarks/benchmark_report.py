"""What the benchmarks share: rows, bars, a JSON file that is written after every row, PASS and FAIL, and a picture.

--json PATH          write the rows, the machine and the bars there, anew after every row: a run that is cut short loses nothing
--picture PATH       draw them (.png, .svg); needs matplotlib
--from-json PATH...  measure nothing: print and draw what earlier runs wrote. Rows of several files are put together; later ones win
--tiny               the same program on small sizes, on any device: does it run? Its figures mean nothing and fail no bar
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """`value` must be at least `limit`, or at most. None: this run did not measure it; NaN: it tried and failed."""

    name: str
    value: float | None
    limit: float
    at_most: bool = False

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit  # NaN passes neither

    def line(self) -> str:
        word = {True: "PASS", False: "FAIL", None: "----"}[self.passed]
        value = "not measured" if self.value is None else "failed" if math.isnan(self.value) else f"{self.value:.3f}"
        return f"{word}  {self.name}: {value} (at {'most' if self.at_most else 'least'} {self.limit})"


def version(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str) -> dict[str, Any]:
    """What a figure was measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    versions = {package: version(package) for package in ("torch", "triton", "torchao")}
    return {"device": name, **versions, "cuda": torch.version.cuda, "date": datetime.date.today().isoformat()}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=writable, help="write the figures here, after every row")
    made.add_argument("--picture", type=drawable, help="draw the figures here: .png or .svg")
    made.add_argument("--from-json", type=figures, nargs="+", help="measure nothing: print and draw these figures")
    made.add_argument("--tiny", action="store_true", help="small sizes on any device: only whether the program runs")
    return made


def writable(text: str) -> Path:
    """An argument: a file that can be written, which is known before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path


def drawable(text: str) -> Path:
    """An argument: a picture that can be written."""
    if Path(text).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text}: pictures are .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("pictures need matplotlib: pip install matplotlib")
    return writable(text)


def figures(text: str) -> Path:
    """An argument: a file that an earlier run wrote with --json."""
    try:
        data = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from error
    if not isinstance(data, dict) or not data.keys() >= {"benchmark", "machines", "rows"}:
        raise argparse.ArgumentTypeError(f"{text} holds no figures of a benchmark, which --json writes")
    return Path(text)


def refuse(text: str) -> NoReturn:
    """As argparse refuses an argument: one line on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
    raise SystemExit(2)


def need_triton() -> None:
    """For scripts that time kernels, before they import them."""
    if importlib.util.find_spec("triton") is None:
        refuse("Triton is needed and not installed, for --tiny too: pip install '.[triton]' in the checkout, or pip install 'triton>=3.6'")


def sliced(items: Sequence[Any], text: str) -> Sequence[Any]:
    """The slice of `items` that the option --shapes names: `0:20`, `27:`. Refused if it is none, or empty."""
    first, _, last = text.partition(":")
    try:
        found = items[int(first or 0) : int(last) if last else None]
    except ValueError:
        refuse(f"argument --shapes: {text!r} is no slice such as 0:1 or 2: of the {len(items)} sizes there are")
    return found or refuse(f"argument --shapes: {text!r} holds none of the {len(items)} sizes there are")


def device_for(options: argparse.Namespace, made: argparse.ArgumentParser) -> str:
    """cuda, or cpu where --tiny or --from-json allows it."""
    if torch.cuda.is_available():
        return "cuda"
    if not options.tiny and not options.from_json:
        made.error("there is no CUDA GPU: only --tiny and --from-json run here")
    return "cpu"


class Report:
    """The rows of one run. `key` names the entries of a row that tell it from others, for putting files together."""

    def __init__(self, benchmark: str, options: argparse.Namespace, device: str, key: Sequence[str]) -> None:
        self.benchmark, self.options, self.key = benchmark, options, key
        self.rows: list[Row] = []
        self.machines = [machine(device)]
        self.bars: list[Bar] = []
        if options.from_json:
            self._load(options.from_json)
        print(f"{benchmark}: {', '.join(f'{k} {v}' for k, v in self.machines[0].items() if v)}", flush=True)

    def _load(self, paths: Iterable[Path]) -> None:
        files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for path, file in zip(paths, files, strict=True):
            if file["benchmark"] != self.benchmark:
                refuse(f"{path} holds figures of {file['benchmark']}, not of {self.benchmark}")
        rows = {tuple(str(row.get(name)) for name in self.key): row for file in files for row in file["rows"]}
        self.rows = list(rows.values())
        named = {json.dumps(made): made for file in files for made in file["machines"]}
        self.machines = list(named.values())

    @property
    def measures(self) -> bool:
        return not self.options.from_json

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        if self.options.json:
            bars = [{**asdict(bar), "passed": bar.passed} for bar in self.bars]
            data = {"benchmark": self.benchmark, "machines": self.machines, "tiny": self.options.tiny, "rows": self.rows, "bars": bars}
            self.options.json.write_text(json.dumps(_finite(data), indent=1) + "\n", encoding="utf-8")

    def finish(self, bars: list[Bar], draw: Callable[[Any, list[Row]], None]) -> int:
        """Print PASS or FAIL for each bar, write the JSON, draw the picture (`draw(figure, rows)`), and return the exit status."""
        self.bars = bars
        for bar in bars:
            print(bar.line())
        self.save()
        if self.options.picture:
            picture(self.options.picture, lambda figure: draw(figure, self.rows))
        if self.options.tiny:
            print("tiny: sizes at which the bars mean nothing")
            return 0
        failed, measured = [bar for bar in bars if bar.passed is False], [bar for bar in bars if bar.passed is not None]
        print(f"{'FAIL' if failed else 'PASS'}: {len(measured)} of {len(bars)} bars measured, {len(failed)} missed")
        return 1 if failed else 0


def picture(path: Path, draw: Callable[[Any], None]) -> None:
    """Make a figure, let `draw` fill it, and save it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"drawn: {path}")


def error_text(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
