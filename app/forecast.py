"""What a run will take, told before it starts: memory, time and disk by arithmetic on shapes."""

from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import methods, prompts
from app.capacity import is_gpu
from app.methods import Method
from app.tables import BaseModel, Experiment, Point, Run, Worker

MB = 2**20
CHECKPOINTS = 3  # two are kept, and the next is written before the older one goes
# Bytes that autograd keeps, counted for Llama and Qwen shapes with hooks on saved tensors: for each
# token and layer by hidden value; times the bytes of a value, by intermediate value and by value
# of the keys. They hold to 1 % for models of this kind.
HIDDEN, INTERMEDIATE, KEYS = 9.8, 3, 2
SCORES = 1.25  # times the bytes of a value, for each head and pair of tokens that see each other
LOSS = 12  # for each target and entry of the vocabulary, the way back included
WHOLE_HIDDEN = 20  # more, where the weights themselves are trained: the inputs of their products
SHORT = 256  # tokens up to which attention on a CPU keeps its scores
# What a process has before it has a model, in MB: libraries on a CPU, the context on a GPU.
PROGRAM_MB = {False: 600.0, True: 600.0}
# How much more than what is kept is resident: products' working memory, and the gaps that a CPU's
# allocator leaves between rows of changing length, the more so where adapters cut the pieces small.
SLACK = {False: 1.5, True: 1.1}
ADAPTED_SLACK = {False: 2.3, True: 1.1}
CHARACTERS = 4.2  # of a token
CHAT_TOKENS = 30  # that a chat format writes around a text
# Multiplications and additions a second where nothing was measured yet: a guess on the low side.
SPEED = {False: 1.5e11, True: 3e13}
START_SECONDS = 15.0
_MARK = "\0"  # where an example's input stands


class Machine(NamedTuple):
    """What a run is computed on: `width` is the bytes of a value that is not trained."""

    gpu: bool = False
    width: int = 2
    token_budget: int = 1024


class Texts(NamedTuple):
    """Tokens of a dataset's examples in their template; of each prompt `shared` are the same."""

    rows: int
    shared: float
    prompt: float
    answer: float
    longest: float

    @property
    def tokens(self) -> float:
        """Of one example, prompt and answer."""
        return self.prompt + self.answer


class Memory(NamedTuple):
    """The most memory of a run in MB, by what it is for."""

    program: float
    weights: float  # as they are held, with the narrow copies that products are made from
    adapters: float  # or the prompt vector
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def make(
    db: Session, experiment: Experiment, method: str, params: dict[str, Any]
) -> dict[str, Any]:
    """What `Run.forecast` holds: memory_mb and gpu_memory_mb with their parts, seconds, bytes.

    Empty where the base model's shapes are not known.
    """
    base_model, kind = experiment.base_model, methods.get(method)
    if "linear" not in base_model.shapes:
        return {}
    given = kind.schema.model_validate(params)
    texts = _texts(experiment, given)
    cpu, gpu, usual = _machines(db)
    on_cpu, on_gpu = (memory(base_model, kind, given, texts, machine) for machine in (cpu, gpu))
    seconds, measured = _seconds(db, experiment, kind, given, texts, usual)
    return {
        "memory_mb": round(on_cpu.total),
        "gpu_memory_mb": round(on_gpu.total),
        "parts": {name: round(value, 1) for name, value in on_cpu._asdict().items()},
        "gpu_parts": {name: round(value, 1) for name, value in on_gpu._asdict().items()},
        "seconds": round(seconds),
        "measured": measured,  # whether the time comes from runs that have ended
        "bytes": _bytes(base_model, kind, given),
    }


def _machines(db: Session) -> tuple[Machine, Machine, bool]:
    """A CPU and a GPU as this studio's are, as far as is known, and whether a GPU is the usual."""
    about = select(Worker.device, Worker.memory_mb).where(
        Worker.kind == "tuner", Worker.memory_mb.is_not(None)
    )
    found = db.execute(about.order_by(Worker.beat_at.desc())).all()
    cards = [memory_mb or 0.0 for device, memory_mb in found if is_gpu(device)]
    begun = select(Run.figures).where(Run.started_at.is_not(None))
    latest = db.scalar(begun.order_by(Run.started_at.desc()).limit(1)) or {}
    width = 4 if latest.get("precision") == "float32" else 2
    budget = max(1024, min(16384, int(max(cards, default=24_000) / 8)))
    return Machine(False, width), Machine(True, 2, budget), bool(cards)


def _texts(experiment: Experiment, params: Any) -> Texts:
    """Told from the dataset's mean and longest lengths; inputs are cut to the maximum length."""
    dataset, has_chat = experiment.dataset, experiment.base_model.has_chat
    half = (
        dataset.num_bytes / dataset.num_examples / 2
    )  # of datasets stored before the lengths were
    into, out = dataset.report.get("mean_input", half), dataset.report.get("mean_output", half)
    most = dataset.report.get("longest_input", 2 * into)
    filled = prompts.fill(experiment.template, _MARK, experiment.labels)
    before, _, after = filled.partition(_MARK)
    shared = len(before) / CHARACTERS + CHAT_TOKENS * has_chat
    answer = out / CHARACTERS + 1
    rest = len(after) / CHARACTERS + answer
    longest = min(params.max_length, shared + most / CHARACTERS + rest)
    tokens = min(longest, shared + into / CHARACTERS + rest)
    rows = len(experiment.split["train"])
    return Texts(rows, min(shared, tokens - answer), tokens - answer, answer, longest)


def memory(
    base_model: BaseModel, method: Method, params: Any, texts: Texts, machine: Machine
) -> Memory:
    """The most memory that training takes on such a machine, of each of its devices."""
    shapes, width = base_model.shapes, machine.width
    trained = method.num_trained(shapes, params)
    parameters = shapes["parameters"]
    if method.frozen_base:
        weights = _frozen_bytes(base_model, method, params, width)
        adapters, parts = 4 * trained, 1
    else:  # in float32, and their copies that products are made from
        weights = (4 + (width if width < 4 else 0)) * parameters
        adapters, parts = 0, int(getattr(params, "devices", 1))
    slack = (ADAPTED_SLACK if method.adapted(shapes, params) else SLACK)[machine.gpu]
    return Memory(
        program=PROGRAM_MB[machine.gpu],
        weights=weights / parts / MB,
        adapters=adapters / MB,
        gradients=4 * trained / parts / MB,
        optimizer=8 * trained / parts / MB,
        activations=_kept(shapes, method, params, texts, machine) * slack / MB,
    )


def _frozen_bytes(base_model: BaseModel, method: Method, params: Any, width: int) -> float:
    parameters: float = base_model.shapes["parameters"]
    if not (method.quantizes or base_model.quantization):
        return width * parameters
    linear: float = sum(
        into * out * count for into, out, count in base_model.shapes["linear"].values()
    )
    scales = 1 / 64 if getattr(params, "double_quantization", True) else 4 / 64
    return (0.5 + scales) * linear + width * (parameters - linear)


def _kept(shapes: dict[str, Any], method: Method, params: Any, texts: Texts, on: Machine) -> float:
    """Bytes kept for the way back from the largest row of a step, and of its loss."""
    size = params.batch_size * params.accumulate_steps
    before = method.virtual_tokens(params) + texts.shared
    each, longest = texts.tokens - texts.shared, max(1.0, texts.longest - texts.shared)
    # As many as a step has or the budget holds; one of them the longest there is.
    places = min(before + size * each + longest - each, max(on.token_budget, before + longest))
    examples = max(1.0, (places - before) / each)
    width, layers = on.width, shapes["layers"]
    keys = shapes["kv_heads"] * shapes["head_dim"]
    layer = places * (
        HIDDEN * shapes["hidden"] + INTERMEDIATE * width * shapes["intermediate"]
    ) + KEYS * width * keys * (places + examples * (before + longest))
    if not on.gpu and longest <= SHORT:
        seen = before**2 + examples * longest * (before + longest)
        layer += SCORES * width * shapes["heads"] * seen
    if not method.frozen_base:
        layer += places * (WHOLE_HIDDEN * shapes["hidden"] + width * shapes["intermediate"])
    inputs = sum(into * count for into, _, count in method.adapted(shapes, params)) / layers
    # With dropout the mask is kept as well as what it left.
    layer += places * inputs * width * (2 if getattr(params, "dropout", 0) else 1)
    if params.gradient_checkpointing:
        kept = layers * places * shapes["hidden"] * width + layer
    else:
        kept = layers * layer
    return float(kept + LOSS * examples * texts.answer * shapes["vocabulary"])


def _seconds(
    db: Session, experiment: Experiment, method: Method, params: Any, texts: Texts, gpu: bool
) -> tuple[float, bool]:
    """From claim to end, and whether that is told from runs of the same base model and method."""
    tokens = texts.rows * texts.tokens * params.num_epochs
    ended = (
        select(Run.id, Run.train_seconds, Run.finished_at - Run.started_at)
        .join(Experiment, Run.experiment_id == Experiment.id)
        .where(Run.state == "succeeded", Run.method == method.key, Run.attempt == 1)
        .where(Experiment.base_model_id == experiment.base_model_id, Run.train_seconds > 0)
    )
    found = db.execute(ended.order_by(Run.finished_at.desc()).limit(5)).all()
    seen = select(func.max(Point.tokens)).where(
        Point.run_id.in_([run_id for run_id, _, _ in found]), Point.kind == "train"
    )
    done = sum(db.scalars(seen.group_by(Point.run_id)).all())
    if done:
        trained = sum(seconds for _, seconds, _ in found)
        beside = sum((whole or 0.0) - seconds for _, seconds, whole in found) / len(found)
        return tokens * trained / done + max(0.0, beside), True
    work = (4 if method.frozen_base else 6) * experiment.base_model.shapes["parameters"]
    held_out = len(experiment.split["validation"]) * 10 + len(experiment.split["test"]) * 4
    looked = held_out * texts.tokens / 3  # forwards only
    return START_SECONDS + (tokens + looked) * work / SPEED[gpu], False


def _bytes(base_model: BaseModel, method: Method, params: Any) -> int:
    """On the disk at most: checkpoints of values and two moments, and the best and last model."""
    trained = method.num_trained(base_model.shapes, params)
    model = 4 * trained if method.frozen_base else 2 * base_model.shapes["parameters"]
    return int(CHECKPOINTS * 12 * trained + 2 * (model + 4e6))  # with a tokenizer each
