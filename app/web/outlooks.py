"""What each method of a new experiment will take, in figures and words: before anything is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pydantic
from sqlalchemy.orm import Session

from app import calibration, forecast, methods, prompts, rehearsals, space, verdicts
from app.errors import Invalid
from app.forecast import Given
from app.tables import Rehearsal, Run
from app.verdicts import Place, Verdict
from app.web import drafts, formats

PARTS = {
    "program": "Program",
    "weights": "Weights",
    "adapters": "Adapters",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "activations": "Activations",
}
VERDICTS = {  # words, and the badge whose shape they have
    verdicts.FITS: ("Fits", "ready"),
    verdicts.IS_TIGHT: ("Tight", "waiting"),
    verdicts.TOO_LARGE: ("Does not fit", "failed"),
    verdicts.UNKNOWN: ("Not known", "queued"),
}
SOURCES = {
    "runs": "the last runs here",
    "run": "the one run that has finished here",
    "rehearsal": "the rehearsal of this configuration",
    "others": "other methods' runs here, a wide guess",
    "shapes": "the model's shapes alone, a wide guess",
}
REHEARSAL = ("state", "progress", "error", "figures", "created_at", "finished_at")
COMPARED: dict[str, tuple[str, Any]] = {
    "memory_mb": ("Peak memory", formats.memory),
    "train_seconds": ("Training", formats.duration),
    "seconds": ("From start to end", formats.duration),
    "size_bytes": ("Size saved, with the tokenizer", formats.size),
}


class Part(NamedTuple):
    """A part of the memory as the bar draws it: from `start`, `width` wide, in thousandths."""

    key: str
    label: str
    mb: float
    start: float
    width: float


@dataclass(frozen=True)
class Outlook:
    """A method's forecast as the form shows it. `problem`: why there is none."""

    problem: str = ""
    need_mb: float = 0.0
    verdict: Verdict = Verdict(verdicts.UNKNOWN, None, None)  # noqa: RUF009 - it never changes
    reason: str = ""  # of one that does not fit
    parts: Sequence[Part] = ()
    limit: float = 1000.0  # where the memory of the machine ends on the bar
    others: Sequence[tuple[Place, str, str]] = ()  # other machines, verdict in words, badge
    time: str = ""
    told_from: Mapping[str, str] = field(default_factory=dict)  # memory, time; and their error
    num_bytes: int = 0
    size_bytes: int = 0
    spare_bytes: int = 0
    rehearsal: Rehearsal | None = None
    doubt: str = ""  # of a parameter that is allowed and hardly meant

    @property
    def words(self) -> tuple[str, str]:
        """The verdict in words, and the badge whose shape it has."""
        return VERDICTS[self.verdict.key]

    @property
    def misfit(self) -> bool:
        """Whether it fits no tuning worker alive."""
        return self.verdict.key == verdicts.TOO_LARGE

    @property
    def going_on(self) -> bool:
        """Whether a rehearsal is waited for."""
        return bool(self.rehearsal and self.rehearsal.state in rehearsals.GOING_ON)


def of(db: Session, sent: Mapping[str, str], page: Mapping[str, Any]) -> dict[str, Outlook]:
    """For each method, for a form as sent, with the page that was made of it."""
    try:
        asked = _given(sent, page)
    except Invalid as problem:
        return {card.method.key: Outlook(problem.message) for card in page["cards"]}
    found, spare = verdicts.places(db), space.spare()
    return {
        card.method.key: Outlook("This base model cannot be tuned so.")
        if card.blocked
        else _outlook(db, asked, card.method.key, sent, found, spare)
        for card in page["cards"]
    }


def _given(sent: Mapping[str, str], page: Mapping[str, Any]) -> Given:
    """Raises Invalid while something that a forecast needs is missing or wrong."""
    dataset, base_model = page["dataset"], page["base_model"]
    if dataset is None or base_model is None:
        raise Invalid("The forecast needs a base model and a dataset.")
    template = prompts.check_template(sent.get("template", ""))
    labels = drafts.lines(sent.get("labels", "")) if sent.get("task") == "classification" else []
    sizes = page["sizes"]
    parts = (sizes["train"], sizes["validation"], sizes["test"])
    return Given(base_model, dataset, template, tuple(labels), parts)


def rehearse(db: Session, draft: drafts.Draft) -> None:
    """Ask for the rehearsal of the method whose button was pressed; nothing if it cannot be."""
    key = draft.sent.get("rehearse", "")
    page = drafts.page(db, draft)
    known = {card.method.key: card for card in page["cards"] if not card.blocked}
    if key not in known:
        return
    try:
        params = methods.get(key).schema.model_validate(drafts.params_of(key, draft.sent))
        asked = _given(draft.sent, page)
    except (Invalid, pydantic.ValidationError):
        return
    rehearsals.ask(db, **asked.row(key, params.model_dump()))


Asked = tuple[Given, dict[str, dict[str, Any]]]


def told(db: Session, asked: Asked) -> dict[str, Any]:
    """For programs: by method the forecast, its verdict and advice, and the rehearsal if there is one."""
    about, chosen = asked
    found, answer = verdicts.places(db), {}
    each = forecast.each(db, about, list(chosen.items()))
    for (key, params), known in zip(chosen.items(), each, strict=True):
        verdict = verdicts.judge(db, about, key, params, known, found)
        done = rehearsals.find(db, about.key(key, params))
        answer[key] = {
            "forecast": known,
            "verdict": verdict.key,
            "advice": verdict.advice,
            "doubt": methods.get(key).doubt(methods.get(key).schema.model_validate(params)),
            "rehearsal": done and {name: getattr(done, name) for name in REHEARSAL},
        }
    return answer


def rehearse_all(db: Session, asked: Asked) -> None:
    """Ask for a rehearsal of each method."""
    about, chosen = asked
    for key, params in chosen.items():
        rehearsals.ask(db, **about.row(key, params))


def _outlook(
    db: Session,
    asked: Given,
    key: str,
    sent: Mapping[str, str],
    found: Sequence[Place],
    spare: int,
) -> Outlook:
    try:
        checked = methods.get(key).schema.model_validate(drafts.params_of(key, sent))
    except pydantic.ValidationError:
        return Outlook("Told again once the parameters are right.")
    params = checked.model_dump()
    told = forecast.of(db, asked, key, params)
    if not told:
        return Outlook("The shapes of this base model are not known, so nothing can be told.")
    verdict = verdicts.judge(db, asked, key, params, told, found)
    gpu = verdict.place.room.gpu if verdict.place else told["device_kind"] == calibration.GPU
    parts, limit = _bar(told["gpu_parts" if gpu else "parts"], verdict)
    others = [place for place in found if place != verdict.place]
    return Outlook(
        need_mb=told["gpu_memory_mb" if gpu else "memory_mb"],
        verdict=verdict,
        reason=verdicts.why(verdict, params) if verdict.key == verdicts.TOO_LARGE else "",
        parts=parts,
        limit=limit,
        others=[(one, *VERDICTS[verdicts.at(told, params, one).key]) for one in others],
        time=formats.span(told["seconds_low"], told["seconds_high"]),
        told_from=sources(told),
        num_bytes=told["bytes"],
        size_bytes=told["size_bytes"],
        spare_bytes=spare,
        rehearsal=rehearsals.find(db, asked.key(key, params)),
        doubt=methods.get(key).doubt(checked),
    )


def _bar(figures: Mapping[str, float], verdict: Verdict) -> tuple[list[Part], float]:
    """The parts side by side on a bar as long as the memory there is, or the need if that is more."""
    need = sum(figures.values())
    most = max(need, verdict.place.room.memory_mb if verdict.place else 0.0)
    drawn, start = [], 0.0
    for key, mb in figures.items():
        width = 1000 * mb / most
        drawn.append(Part(key, PARTS.get(key, key), mb, round(start, 2), round(width, 2)))
        start += width
    limit = 1000 * verdict.place.room.memory_mb / most if verdict.place else 1000.0
    return drawn, round(limit, 2)


def sources(told: Mapping[str, Any]) -> dict[str, str]:
    """What memory and time are told from, and how far off the last forecasts were, in words."""
    memory = told["memory_from"][told["device_kind"]]
    errors = [
        f"{what} {formats.errors(error['low'], error['high'])}"
        for what, error in (("memory", told["memory_error"]), ("time", told["time_error"]))
        if error
    ]
    runs = max((told[name] or {"runs": 0})["runs"] for name in ("memory_error", "time_error"))
    said = "last run: " if runs == 1 else f"last {runs} runs: "
    return {
        "memory": "arithmetic on the model's shapes" if memory == "shapes" else SOURCES[memory],
        "time": SOURCES[told["time_from"]],
        "error": said + ", ".join(errors) if errors else "",
    }


def side_by_side(run: Run) -> list[tuple[str, str, str, str]]:
    """A run's forecast and what was measured: label, both in words, and how far off it was."""
    return [
        (
            label,
            words(one.forecast),
            words(one.measured),
            formats.NOTHING if one.error is None else formats.errors(one.error, one.error),
        )
        for one in calibration.compared(run)
        for label, words in [COMPARED[one.what]]
        if one.forecast
    ]
