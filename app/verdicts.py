"""Whether a run fits the tuning workers that are alive, and if not, the one change that makes it fit."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import base_models, capacity, forecast, lengths, methods, naming, workers
from app.capacity import Room
from app.errors import Invalid
from app.forecast import Given

TIGHT = 0.85  # of the memory: beyond, a forecast that is a little wrong does not fit
FITS, IS_TIGHT, TOO_LARGE, UNKNOWN = "fits", "tight", "too-large", "unknown"


class Place(NamedTuple):
    """Tuning workers that are alike: their device by name, what each has, and their number."""

    device: str
    room: Room
    number: int


class Verdict(NamedTuple):
    """A run at the place that suits it best. `advice`: the change that makes it fit, in words."""

    key: str  # fits, tight, too-large; unknown: no worker has said what it has
    need_mb: float | None
    place: Place | None
    advice: str = ""

    @property
    def share(self) -> float:
        """Of the memory there."""
        return (self.need_mb or 0.0) / self.place.room.memory_mb if self.place else 0.0


class Change(NamedTuple):
    """One thing to do otherwise, as a sentence's beginning."""

    words: str
    method: str
    params: dict[str, Any]


def places(db: Session) -> list[Place]:
    """The tuning workers that are alive and have said what they have, the largest first."""
    rooms = [
        (one.device, room)
        for one in workers.alive(db)
        if one.kind == "tuner" and (room := workers.room(one))
    ]
    alike = [Place(*one, rooms.count(one)) for one in dict.fromkeys(rooms)]
    return sorted(alike, key=lambda place: -place.room.memory_mb * place.room.devices)


def of(told: Mapping[str, Any], params: Mapping[str, Any], found: Sequence[Place]) -> Verdict:
    """Of a run with this forecast: at the place where it fits best."""
    order = (FITS, IS_TIGHT, TOO_LARGE, UNKNOWN)
    judged = [at(told, params, place) for place in found] or [Verdict(UNKNOWN, None, None)]
    return min(judged, key=lambda one: (order.index(one.key), one.share))


def at(told: Mapping[str, Any], params: Mapping[str, Any], place: Place) -> Verdict:
    """The same at one place."""
    need = capacity.need(dict(told), place.room.gpu)
    if need is None:
        return Verdict(UNKNOWN, None, place)
    enough = capacity.devices(dict(params)) <= place.room.devices
    if need > place.room.memory_mb or not enough:
        return Verdict(TOO_LARGE, need, place)
    return Verdict(IS_TIGHT if need > TIGHT * place.room.memory_mb else FITS, need, place)


def judge(
    db: Session,
    asked: Given,
    method: str,
    params: dict[str, Any],
    told: Mapping[str, Any],
    found: Sequence[Place],
) -> Verdict:
    """The verdict, with advice where it does not fit: found by forecasting each change in turn."""
    verdict = of(told, params, found)
    if verdict.key != TOO_LARGE:
        return verdict
    for change in _changes(asked, method, params, found):
        then = of(forecast.of(db, asked, change.method, change.params), change.params, found)
        if then.key in (FITS, IS_TIGHT):
            need = f"{(then.need_mb or 0.0) / 1000:.1f} GB"
            return verdict._replace(advice=f"{change.words} makes it fit: about {need}.")
    return verdict._replace(advice="No single change of its parameters makes it fit.")


def _changes(
    asked: Given, method: str, params: dict[str, Any], found: Sequence[Place]
) -> Iterator[Change]:
    """What to try, the least harm to the result first."""

    def change(words: str, **values: Any) -> Change:
        return Change(words, method, params | values)

    most = max(place.room.devices for place in found)
    if capacity.devices(params) > most:
        yield change(f"Devices {most}", devices=most)
    batch, steps = params["batch_size"], params["accumulate_steps"]
    while batch > 1 and steps * 2 <= 128:
        batch, steps = batch // 2, steps * 2
        words = f"Batch size {batch} with {steps} accumulate steps"
        yield change(words, batch_size=batch, accumulate_steps=steps)
    if not params["gradient_checkpointing"]:
        yield change("Activation checkpointing", gradient_checkpointing=True)
    totals = lengths.of(asked.base_model, asked.dataset, asked.template, asked.labels).totals()
    for length in (2048, 1024, 768, 512, 384, 256, 128):
        if length < min(params["max_length"], max(totals)) and length > min(totals) / 2:
            yield change(f"Maximum length {length}", max_length=length)
    batch = params["batch_size"]
    while batch > 1:
        batch //= 2
        words = f"Batch size {batch} without accumulating"
        yield change(words, batch_size=batch, accumulate_steps=1)
    if not methods.get(method).frozen_base and capacity.devices(params) < most:
        yield change(f"Devices {most}", devices=most)
    for key in base_models.methods_for(asked.base_model):
        if methods.get(key).quantizes and key != method:
            fields = methods.get(key).schema.model_fields
            same = {name: value for name, value in params.items() if name in fields}
            same.pop("learning_rate")
            full = methods.get(key).schema.model_validate(same).model_dump()
            yield Change(f"{methods.get(key).label} instead", key, full)


def check(
    db: Session,
    asked: Given,
    wanted: Sequence[tuple[str, dict[str, Any]]],
    told: Sequence[dict[str, Any]],
) -> None:
    """Raises Invalid, field "override", if one of the runs fits no tuning worker that is alive."""
    found = places(db)
    said = []
    names = naming.planned(wanted)
    for name, (key, params), known in zip(names, wanted, told, strict=True):
        verdict = judge(db, asked, key, params, known, found)
        if verdict.key == TOO_LARGE:
            said.append(f"{name}: {why(verdict, params)} {verdict.advice}")
    if said:
        raise Invalid(
            "Nothing was started, because this fits no tuning worker that is alive. "
            + " ".join(dict.fromkeys(said))
            + " Change it, or ask for it to be started although it does not fit.",
            field="override",
        )


def fitting(
    db: Session, asked: Given, chosen: Mapping[str, dict[str, Any]]
) -> Mapping[str, dict[str, Any]]:
    """Those that fit a tuning worker alive; all of them if none does, so that it is said why."""
    found = places(db)
    fit = {
        key: params
        for key, params in chosen.items()
        if of(forecast.of(db, asked, key, params), params, found).key != TOO_LARGE
    }
    return fit or chosen


def why(verdict: Verdict, params: Mapping[str, Any]) -> str:
    """What is too much, in a sentence."""
    place = verdict.place
    assert place is not None
    if capacity.devices(dict(params)) > place.room.devices:
        return f"it wants {params['devices']} devices, and {place.device} has {place.room.devices}."
    return (
        f"it needs about {(verdict.need_mb or 0.0) / 1000:.1f} GB of memory, and "
        f"{place.device} has {place.room.memory_mb / 1000:.1f} GB."
    )
