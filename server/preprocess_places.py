"""Where each model's pictures are decoded: chosen by what NVML says of the slices, and again when they change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import structlog

from partitioner.geometry import Slice
from partitioner.nvml_types import Gpu
from preprocess.devices import Device, Facts, Place, Target, choose
from preprocess.pipeline import PipelineError
from preprocess.pool import PreprocessPool
from scheduler.staff import Worker
from server.settings import Settings

if TYPE_CHECKING:
    from server.repository import Model

log = structlog.get_logger(__name__)


class PreprocessPlaces:
    """For the repository it chooses; for the fleet it is the lodger on its slices (`scheduler.staff.Lodger`).

    `serving`: the workers of a model.
    """

    def __init__(self, settings: Settings, pool: PreprocessPool, serving: Callable[[str], Sequence[Worker]]) -> None:
        self._settings = settings
        self._pool = pool
        self._serving = serving
        self._gpus: Callable[[], Sequence[Gpu]] = lambda: ()
        self._models: Callable[[], Sequence[Model]] = lambda: ()

    def watch(self, gpus: Callable[[], Sequence[Gpu]], models: Callable[[], Sequence[Model]]) -> None:
        """Where it looks for the slices that there are, and for all models."""
        self._gpus, self._models = gpus, models

    async def prepare(self, model: Model) -> None:
        """Gets ready what the model's pipeline needs. Raises PipelineError where that is not to be had."""
        pipeline = model.serving.preprocess
        if pipeline is None:
            return
        target, why = choose(Device(pipeline.device), pipeline.image is not None, self._facts(model))
        await self._pool.prepare(pipeline, target)
        if pipeline.image is not None:
            log.info("preprocessing", model=model.name, decoder=target.decoder, devices=target.uuids, reason=why)

    def _facts(self, model: Model) -> Facts:
        gpus = self._gpus()
        serving = {each.where.device_uuid: place_of(each.where, gpus) for each in self._serving(model.key)}
        kept = [each for gpu in gpus for each in gpu.slices if each.name == self._settings.preprocess_slice]
        return Facts(
            self._settings.preprocess_decoder,
            list(serving.values()),
            place_of(kept[0], gpus) if kept else None,
            find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None,
            self._settings.isolate_decoders,
        )

    # ---- the lodger ----

    def pids(self, device_uuid: str | None = None) -> list[int]:
        return self._pool.pids(device_uuid)

    async def leave(self, slices: Sequence[Slice]) -> None:
        """Ends the processes on these slices: while any runs there they cannot be changed. The CPU goes on."""
        await asyncio.to_thread(self._pool.leave, [each.device_uuid for each in slices])

    async def settle(self) -> None:
        """Chooses again, after slices have changed. Where that fails the CPU goes on."""
        for model in self._models():
            if model.state != "READY":
                continue
            try:
                await self.prepare(model)
            except PipelineError as error:
                log.warning("preprocessing goes on on the CPU", model=model.name, reason=str(error))
                if model.serving.preprocess is not None:
                    await self._pool.prepare(model.serving.preprocess, Target())


def place_of(where: Slice, gpus: Sequence[Gpu]) -> Place:
    """With its JPEG engines: of its MIG profile, or of the largest one where the GPU is whole."""
    model = next((gpu.model for gpu in gpus if gpu.uuid == where.gpu_uuid), None)
    if model is None or not model.profiles:
        return Place(where.name, where.device_uuid, None, where.simulated)
    whole = max(model.profiles, key=lambda profile: (profile.gpcs, profile.jpeg))
    profile = model.profile(where.mig_profile) if where.mig_profile else whole
    return Place(where.name, where.device_uuid, profile.jpeg, where.simulated)
