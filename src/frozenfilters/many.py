"""Several trainings at once: the same numbers as one after another, in less time.

Seeds, learning rates, LC rates, banks or whole architectures: each member is a training of its own. Which way is taken depends on
the machine and the members, never the result:

    CPU     one process with one thread for each core: bit-identical to `fit` with one thread
    tiny    equal tiny networks as one grouped network (see `grouped`): equal up to the rounding of sums
    CUDA    one CUDA graph that holds one step of every member, each on its own stream (see `steps`): likewise
"""
from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import machine, steps
from .batches import Batches, as_batches
from .grouped import Grouped, tiny
from .measure import evaluating
from .train import SCHEDULES, History, fit, resolve_precision

FREE = ("seed", "lr", "weight_decay")                       # what members that run as one network may differ in
SIMPLE = (*FREE, "epochs", "batch_size", "momentum", "nesterov", "schedule", "warmup", "label_smoothing", "loss", "crop", "flip", "device", "precision")


def fit_many(members: Sequence[dict], train, val=None, *, workers: int | None = None, fuse: bool | str = "auto", **common) -> list[History | Exception]:
    """Train several members, as `fit` would one after another; a failed member does not take the others down.

    Args:
        members: one dict for each: `model`, a network (trained in place) or a function without arguments that builds one (called
            with torch's generator seeded by the member's `seed`), and any argument of `fit` that is this member's own.
        train, val: as in `fit`, the same for all.
        workers: processes with one thread each; default: the cores that this process may use, 1 inside a process of this kind.
            1 trains in this process.
        fuse: True runs equal networks as one grouped network, or raises with the reason; False never does; "auto" does where
            it is faster: equal tiny networks, of which only seed, lr and weight_decay differ.
        **common: arguments of `fit` for all members. Callbacks hold a member's state, so each member has its own.

    Returns:
        For each member, in order, its `History` with the trained network as `.model`, or the exception that ended it
        (`DivergedError` among them), with the traceback as a note; the weights of a failed member mean nothing.

    Raises:
        ValueError, TypeError: members or arguments that cannot be meant.

    >>> from frozenfilters import data, models
    >>> digits = data.load("digits").subset(64)
    >>> build = lambda: models.normalized(models.convmixer(width=4, depth=1, in_channels=1), [0.3], [0.4])
    >>> histories = fit_many([{"model": build, "seed": s} for s in range(3)], digits, epochs=1)
    >>> [len(history) for history in histories]
    [1, 1, 1]
    """
    jobs = _jobs(members, common, fuse)
    workers = workers or (machine.cores() if multiprocessing.parent_process() is None else 1)
    for batch in _fusable(jobs, train, fuse):
        _fused(batch, train, val, must=fuse is True)
    for batch in _recordable(jobs, train):
        _side_by_side(batch, train, val)
    rest = [job for job in jobs if job.result is None]
    if workers > 1 and len(rest) > 1 and not any(job.device.type == "cuda" for job in rest):
        _in_processes(rest, train, val, min(workers, len(rest)))
    for job in jobs:
        if job.result is None:
            job.result = _attempt(fit, job.model, train, val, **job.options)
        if isinstance(job.result, History):
            job.result.model = job.model
    return [job.result for job in jobs]


class _Job:
    """A member: its network, the arguments of its `fit`, and what came of it."""

    def __init__(self, model: nn.Module | Callable[[], nn.Module], options: dict):
        self.options, self.result, self.model = options, None, model
        self.device = torch.device("cpu")
        if not isinstance(model, nn.Module):
            self.model = _attempt(_build, model, options.get("seed", 0))
        if isinstance(self.model, Exception):
            self.result = self.model
        else:
            self.device = torch.device(options.get("device") or next((p.device for p in self.model.parameters()), "cpu"))

    def __getitem__(self, name: str):
        """The argument `name` of this member's `fit`, its default bound."""
        return self.options.get(name, _ARGUMENTS[name].default)

    def why_not_a_step(self, train) -> str | None:
        """Why this training needs `fit` itself, or None if a `Step` can do the same."""
        odd = [name for name in self.options if name not in SIMPLE and self[name] != _ARGUMENTS[name].default]
        if odd:
            return f"{', '.join(odd)} must be left to fit"
        if not (isinstance(getattr(train, "images", None), Tensor) and isinstance(getattr(train, "labels", None), Tensor)):
            return "train is not an ImageSet, so that its order cannot be drawn beforehand"
        if any(word in type(m).__name__.lower() for m in self.model.modules() for word in ("drop", "stochastic") if getattr(m, "p", 1) > 0):
            return "the network has dropout, which draws random numbers in every step"
        return None if any(p.requires_grad for p in self.model.parameters()) else "the network has nothing to train"


_ARGUMENTS = {name: p for name, p in inspect.signature(fit).parameters.items() if name not in ("model", "train", "val")}


def _jobs(members: Sequence[dict], common: dict, fuse) -> list[_Job]:
    if fuse not in (True, False, "auto"):
        raise ValueError(f"fuse={fuse!r} is none of True, False, 'auto'")
    if not members:
        raise ValueError("members is empty: give at least one dict with a model")
    if common.get("callbacks"):
        raise ValueError("callbacks hold the state of one training: give each member its own, {'model': ..., 'callbacks': [...]}")
    for i, member in enumerate(members):
        if "model" not in member or not callable(member["model"]):
            raise ValueError(f"members[{i}] has no model: give {{'model': a network or a function that builds one, ...}}")
        if unknown := (set(member) | set(common)) - {"model"} - set(_ARGUMENTS):
            raise TypeError(f"members[{i}]: fit has no argument {', '.join(sorted(unknown))}; it has {', '.join(_ARGUMENTS)}")
    own = [id(x) for m in members for x in (m["model"], *m.get("callbacks", ())) if isinstance(x, nn.Module) or not callable(x)]
    if len(set(own)) < len(own):
        raise ValueError("members share a network or a callback: each needs its own (copy.deepcopy, or a function that builds one)")
    return [_Job(m["model"], {**common, **{k: v for k, v in m.items() if k != "model"}}) for m in members]


def _attempt(function: Callable, *args, **kwargs):
    """The result, or the exception with its traceback as a note."""
    try:
        return function(*args, **kwargs)
    except Exception as error:                             # noqa: BLE001  whatever it was, the other members go on
        error.add_note(traceback.format_exc())
        return error


def _build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def _in_processes(jobs: list[_Job], train, val, workers: int) -> None:
    """One process with one thread for each member at a time; what it learned is loaded into the member's own network."""
    import cloudpickle
    from joblib import Parallel, delayed, parallel_config
    sent = {}
    for i, job in enumerate(jobs):
        payload = _attempt(cloudpickle.dumps, (job.model, job.options))
        if isinstance(payload, Exception):
            payload.add_note("this member cannot be sent to another process; workers=1 trains it here")
            job.result = payload
        else:
            sent[i] = payload
    try:
        with parallel_config(backend="loky", inner_max_num_threads=1):
            tasks = (delayed(_worker)(i, payload, train, val) for i, payload in sent.items())
            for i, payload in Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1)(tasks):
                jobs[i].result = _attempt(_receive, jobs[i], payload)
    except RuntimeError as error:                          # a process was killed (out of memory?): what came back before it counts
        for i in sent:
            jobs[i].result = error if jobs[i].result is None else jobs[i].result


def _worker(i: int, payload: bytes, train, val) -> tuple[int, bytes]:
    import cloudpickle
    model, options = pickle.loads(payload)
    with machine.tuned(threads=1):
        result = _attempt(fit, model, train, val, **options)
    if isinstance(result, Exception):
        notes = "\n".join(getattr(result, "__notes__", []))
        back = _attempt(lambda: pickle.loads(pickle.dumps(result)) and pickle.dumps(result))
        return i, back if isinstance(back, bytes) else pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}\n{notes}"))
    return i, cloudpickle.dumps((result, model.state_dict(), [vars(c) for c in options.get("callbacks", ())]))


def _receive(job: _Job, payload: bytes) -> History | Exception:
    received = pickle.loads(payload)
    if isinstance(received, Exception):
        return received
    history, state, callbacks = received
    job.model.to(memory_format=torch.channels_last).train()
    job.model.load_state_dict(state)
    for mine, theirs in zip(job.options.get("callbacks", ()), callbacks, strict=True):
        vars(mine).update(theirs)
    return history


def _loaders(jobs: list[_Job], train) -> list[Batches]:
    """The members' batches over one stored copy of the data, each with its own generator."""
    first = jobs[0]
    one = as_batches(train, first["batch_size"], shuffle=True, crop=first["crop"], flip=first["flip"], device=first.device, generator=torch.Generator())
    if not one.resident:
        raise ValueError("the data set does not fit on the device as a whole")
    loaders = [copy.copy(one) for _ in jobs]
    for loader, job in zip(loaders, jobs, strict=True):
        loader.generator = torch.Generator().manual_seed(job["seed"])
    return loaders


def _step(model: nn.Module, jobs: list[_Job], loaders: list[Batches]) -> steps.Step:
    first = jobs[0]
    schedule = first["schedule"] if callable(first["schedule"]) else SCHEDULES.get(first["schedule"])
    if schedule is None:
        raise ValueError(f"schedule={first['schedule']!r} is none of {', '.join(SCHEDULES)}; pass one of them or a function of the share done")
    options = {name: first[name] for name in ("epochs", "momentum", "warmup", "label_smoothing")}
    return steps.Step(model.to(first.device, memory_format=torch.channels_last), loaders, **options, lr=[job["lr"] for job in jobs],
                      weight_decay=[job["weight_decay"] for job in jobs], nesterov=first["nesterov"] and first["momentum"] > 0, schedule=schedule,
                      criterion=first["loss"], half=resolve_precision(first["precision"], model, first.device))


def _fusable(jobs: list[_Job], train, fuse) -> list[list[_Job]]:
    """Sets of members with equal arguments (but for `FREE`) that a grouped network may hold."""
    sets: list[list[_Job]] = []
    for job in jobs if fuse else []:
        reason = job.why_not_a_step(train) if job.result is None else "the network could not be built"
        if fuse is True and reason:
            raise ValueError(f"fuse=True: {reason}; use fuse='auto'")
        if reason or fuse == "auto" and _attempt(tiny, job.model, train.images[:1].to(job.device) / 255, min(job["batch_size"], len(train.images))) is not True:
            continue
        alike = [s for s in sets if repr(s[0].model) == repr(job.model) and all(s[0][name] == job[name] for name in SIMPLE if name not in FREE)]
        if alike:
            alike[0].append(job)
        else:
            sets.append([job])
    if fuse is True and any(len(s) == 1 for s in sets):
        raise ValueError(f"fuse=True: a member has no other of its structure and arguments; only {', '.join(FREE)} may differ; use fuse='auto'")
    return [s for s in sets if len(s) > 1]


def _fused(jobs: list[_Job], train, val, must: bool) -> None:
    """Members as one grouped network. If they cannot be one: raise if they `must`, else leave them to the other ways."""
    try:
        device = jobs[0].device
        one = Grouped([job.model.to(device) for job in jobs], train.images[:2].to(device) / 255)
        step = _step(one.model, jobs, _loaders(jobs, train))
        steps.run([step], val, capture=device.type == "cuda")
    except Exception as error:                             # noqa: BLE001  nothing is written before scatter: every member can still be trained alone
        if must:
            raise ValueError(f"fuse=True: {error}; use fuse='auto'") from error
        return
    for job in jobs:
        job.model.to(memory_format=torch.channels_last).train()
    one.scatter()
    for job, result in zip(jobs, step.results, strict=True):
        job.result = result


def _recordable(jobs: list[_Job], train) -> list[list[_Job]]:
    """On a GPU: sets of members whose epochs have equally many steps, so that one graph holds a step of each."""
    sets: dict[tuple, list[_Job]] = {}
    for job in jobs:
        if job.result is None and job.device.type == "cuda" and job.why_not_a_step(train) is None:
            sets.setdefault((job["epochs"], job["batch_size"], str(job.device)), []).append(job)
    return list(sets.values())


def _side_by_side(jobs: list[_Job], train, val, capture: bool = True) -> None:
    """Each member's step on its own stream of one CUDA graph (`capture=False`: one after another, without a GPU).

    A member that cannot do one step so (or be recorded: it asks for a value in every step) is left to `fit`.
    """
    shared: dict[tuple, Batches] = {}                      # one stored copy of the data for members that read it alike

    def prepare(job: _Job) -> steps.Step:
        key = job["crop"], job["flip"]
        if key not in shared:
            shared[key] = _loaders([job], train)[0]
        loader = copy.copy(shared[key])
        loader.generator = torch.Generator().manual_seed(job["seed"])
        step = _step(job.model, [job], [loader])
        step.start(0)
        with evaluating(job.model), torch.no_grad():
            x, y = step.read(step.last if step.rest else step.places[0])
            step.losses(job.model(x), y)
        if capture and step.full:
            steps.record([step])
        loader.generator.manual_seed(job["seed"])
        return step
    ready = [(job, step) for job in jobs if isinstance(step := _attempt(prepare, job), steps.Step)]
    error = _attempt(steps.run, [step for _, step in ready], val, capture=capture) if ready else None
    for job, step in ready:
        job.result = error or step.results[0]
