"""How a fake vLLM takes in weights; a load under running requests kills it, as does a bad one."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from support.server_faults import FaultyServer
from support.vllm_forms import DEAD, error, read_first_values

MAX_LORA_RANK = 8


class FakeWeights(FaultyServer):
    """The routes for weights."""

    def reset(self, settings: dict[str, Any]) -> None:
        super().reset(settings)
        self.paused = self.dead = self.bad_load = False
        self.num_workers = int((vars(self.options) | settings).get("num_workers", 1))
        # of its weights, as the worker extension says; True is the answer of an older one
        self.types: list[str] | bool = settings.get("types", True)
        self.adapters: dict[str, dict[str, Any]] = {}
        self.receiving = 0
        self.worker: Any = None
        self.loads: list[list[str]] = []
        self.weights: dict[str, float] = {}

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        method, arguments = body["method"], body["kwargs"]
        if method == "sdp_hello" and not self.dead:
            return web.json_response({"results": [self.types] * self.num_workers})
        uses = {"sdp_load_folder": "load", "sdp_load_anchor": "anchor", "sdp_apply_delta": "delta"}
        if method not in (*uses, "sdp_receive") or self.dead:
            return error(500, DEAD if self.dead else f"no method {method}")
        if self.running and not self.paused:
            self.dead = True  # weights changed under running requests
            return error(500, DEAD)
        if self.take_fault("/collective_rpc", "load"):
            self.bad_load = True
            return error(500, "Worker failed with error 'cannot find any safetensors'")
        if method == "sdp_receive":
            return await self.receive(arguments)
        files = sorted(Path(arguments["folder"]).glob("*.safetensors"))
        if not files:
            self.bad_load = True
            return error(500, f"cannot find any safetensors in {arguments['folder']}")
        if method != "sdp_load_folder":
            from safetensors.torch import load_file

            sent = {name: t for file in files for name, t in load_file(file).items()}
            return await self.use(sent, uses[method])
        self.take_in([read_first_values(file) for file in files])
        return web.json_response({"results": [None] * self.num_workers})

    async def use(self, sent: dict[str, Any], use: str) -> web.Response:
        """As the worker extension does, whose own code it is."""
        from support.delta_worker import DeltaWorker

        self.worker = self.worker or DeltaWorker()
        try:
            self.worker._sdp_use(sent, use)
        except Exception as found:
            return error(500, f"Worker failed with error '{found}'")
        loaded = {name: float(t.flatten()[0]) for name, t in self.worker.held.items()}
        self.take_in([loaded])
        self.loads[-1] = [use, *sorted(sent)]
        return web.json_response({"results": [None] * self.num_workers})

    def take_in(self, files: list[dict[str, float]]) -> None:
        for loaded in files:
            self.weights |= loaded
            self.loads.append(sorted(loaded))
        self.bad_load = False

    async def receive(self, arguments: dict[str, Any]) -> web.Response:
        """As the workers do; a fault "stall" stops one of them after the first tensor."""
        from sdp_lightning.errors import EngineError
        from sdp_lightning.weights.protocol import Receive
        from sdp_lightning.weights.tcp import receive

        what, loop = Receive(**arguments), asyncio.get_running_loop()
        stalls = self.take_fault("/collective_rpc", "stall")

        def work(worker: int) -> dict[str, Any]:
            loaded: dict[str, Any] = {}
            for name, tensor in receive(what, worker):
                loaded[name] = tensor
                if stalls:
                    asyncio.run_coroutine_threadsafe(self.note_receiving(), loop).result()
                    threading.Event().wait()
            return loaded

        workers = [asyncio.to_thread(work, number) for number in range(self.num_workers)]
        try:
            loaded = await asyncio.gather(*workers)
        except EngineError as found:
            return error(500, f"Worker failed with error '{found}'")
        if what.use != "load":
            return await self.use(loaded[0], what.use)
        firsts = [{name: float(t.flatten()[0]) for name, t in one.items()} for one in loaded]
        assert all(one == firsts[0] for one in firsts)
        self.take_in([firsts[0]])
        return web.json_response({"results": [None] * self.num_workers})

    async def note_receiving(self) -> None:
        self.receiving += 1
        await self.notify()

    async def load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters and not body.get("load_inplace"):
            message = f"The lora adapter '{name}' has already been loaded. If you want to load the "
            message += "adapter in place, set 'load_inplace' to True."
            return error(400, message, "InvalidUserInput")
        if not (folder / "adapter_config.json").exists():
            message = f"Loading lora {name} failed: No adapter found for {folder}"
            return error(404, message, "NotFoundError")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > MAX_LORA_RANK:
            message = f"LoRA rank {rank} is greater than max_lora_rank {MAX_LORA_RANK}."
            return error(
                500, f"Call to add_lora method failed: Worker failed with error '{message}"
            )
        values = read_first_values(folder / "adapter_model.safetensors")
        self.adapters[name] = {"folder": str(folder), "weights": values}
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")
