"""Forward and backward through the base, to the gradient of the adapter alone. By hand: a layer keeps what its adapters
need and no more, and nothing is made that is not used (the base's weights have no gradient, the embedding neither).

Suffixes as in base and space."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from lib.lora.adapter import Adapter
from lib.lora.base import Base
from lib.lora.batches import Micro
from lib.lora.relay import Way
from lib.lora.space import HEAD_ROWS, Size, Space
from lib.models.decoder import on, to_device
from lib.models.tokens import must_know


class Step:
    """What a base does of a micro-batch. `room`: of so many that are under way at once, each in a slot."""

    def __init__(self, base: Base, adapter: Adapter, size: Size, rows: int, room: int = 1) -> None:
        self.base, self.adapter, self.products, self.size, self.rows = base, adapter, adapter.products, size, rows
        self.space = Space(base, size)
        self.spaces = [self.space, *(Space(base, size, self.space) for _ in range(room - 1))]
        self.ops = ops_for(base)
        self._captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._side = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None

    @torch.no_grad()
    def run(self, micro: Micro, share: float) -> torch.Tensor:
        """The adapter's products of one micro-batch, and its loss, every prediction times `share`, one value."""
        self.put(micro, share)
        self.turn("both", micro)
        return self.loss(micro)

    def turn(self, way: Way, micro: Micro, slot: int = 0) -> None:
        """Through all layers: forwards, backwards, or both, with the loss between."""
        self.recorded((way, slot, micro.size), lambda: self._body(way, self.spaces[slot], *micro.size))

    def loss(self, micro: Micro) -> torch.Tensor:
        return self.space.loss_P[: micro.size[1]].sum()

    def collect(self, add: bool) -> None:
        """The products into the gradient."""
        self.recorded(("collect", add), lambda: self.adapter.collect(add))

    def recorded(self, key: Hashable, body: Callable[[], None]) -> None:
        """On a GPU one graph a key. The first time as it is, which builds the kernels, and recorded, which computes
        nothing."""
        if self._side is None:
            body()
            return
        with on(self.base.device):
            if key in self._captured:
                self._captured[key].replay()
                return
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                body()
            torch.cuda.current_stream().wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side):
                body()
            self._pool = graph.pool()
            self._captured[key] = graph

    def put(self, micro: Micro, share: float, slot: int = 0) -> None:
        """What a micro-batch is; where the embedding lies, its tokens', and where the head lies, what it predicts."""
        s, base, (tokens, places) = self.spaces[slot], self.base, micro.size
        table, device = base.embedding, base.device
        if table is not None:
            must_know(int(micro.ids.min()), int(micro.ids.max()), base.shape.vocabulary)
            rows = table[to_device(micro.ids, table.device)]
            s.x_LMD[0, :tokens].copy_(rows.pin_memory() if table.device != device else rows, non_blocking=True)
        positions = to_device(micro.positions, device)
        s.cos_Md[:tokens].copy_(base.rope[0][positions])
        s.sin_Md[:tokens].copy_(base.rope[1][positions])
        if base.head is not None:
            s.where_P[:places].copy_(to_device(micro.where, device), non_blocking=True)
            s.target_P[:places].copy_(to_device(micro.targets, device), non_blocking=True)
            s.share.fill_(share)
        if tokens not in s.segments:
            s.segments[tokens] = self.ops.Segments.empty(base.shape, tokens, self.rows, device)
        s.segments[tokens].put(micro.segments)

    def _body(self, way: Way, s: Space, tokens: int, places: int) -> None:
        layers = range(self.base.shape.layers)
        if way != "backward":
            for i in layers:
                self._forward(s, i, tokens)
        if way == "both":
            self._head(s, tokens, places)
        if way != "forward":
            for i in reversed(layers):
                if self.size.recompute and (way != "both" or i != layers[-1]):
                    self._forward(s, i, tokens, again=True)
                self._backward(s, i, tokens)

    def _forward(self, s: Space, i: int, m: int, again: bool = False) -> None:
        """`again`: all but the layer's result, which is there."""
        w, kept, ops, shape, d = self.base.stack, s.kept, self.ops, self.base.shape, self.base.shape.hidden
        k = 0 if self.size.recompute else i
        x, normed, middle = s.x_LMD[i, :m], kept.normed1_KMD[k, :m], kept.middle_KMD[k, :m]
        ops.rms_norm(x, w.norm1_LD[i], shape.eps, normed[:, :d])
        torch.mm(normed[:, :d], w.a_qkv_LRD[i].t(), out=normed[:, d:])
        qkv, attended, t = kept.qkv_KMX[k, :m], kept.attended_KMQ[k, :m], kept.t_o_KMR[k, :m]
        if w.bias_LX is None:
            torch.mm(normed, w.qkv_LXD[i].t(), out=qkv)
        else:
            torch.addmm(w.bias_LX[i], normed, w.qkv_LXD[i].t(), out=qkv)
        ops.rotate(qkv, s.cos_Md[:m], s.sin_Md[:m], shape)
        ops.attend(qkv, s.segments[m], shape, attended, kept.lse_KMH[k, :m])
        torch.mm(attended, w.o_LDQ[i, d:].t(), out=t)
        made = torch.mm(attended, w.o_LDQ[i, :d].t(), out=s.dnormed_MD[:m, :d])  # free on the way forward
        ops.add_adapter(x, made, t, w.b_o_LDR[i], middle)
        normed, gate_up, t = kept.normed2_KMD[k, :m], kept.gate_up_KMG[k, :m], kept.t_down_LMR[i, :m]
        ops.rms_norm(middle, w.norm2_LD[i], shape.eps, normed[:, :d])
        torch.mm(normed[:, :d], w.a_gate_up_LRD[i].t(), out=normed[:, d:])
        torch.mm(normed, w.gate_up_LGD[i].t(), out=gate_up)
        inner, out = s.inner_MF[:m], s.x_LMD[i + 1, :m]
        if not again:
            ops.swiglu(gate_up, w.down_LDF[i, d:], inner, t)
            torch.mm(inner, w.down_LDF[i, :d].t(), out=made)
            ops.add_adapter(middle, made, t, w.b_down_LDR[i], out)

    def _head(self, s: Space, m: int, p: int) -> None:
        """The loss where there is one, and g, its gradient at the last layer's result."""
        base, ops, d = self.base, self.ops, self.base.shape.hidden
        assert base.norm is not None and base.head is not None
        where, picked, hidden, dhidden = s.where_P[:p], s.picked_PD[:p], s.hidden_PD[:p], s.dhidden_PD[:p]
        torch.index_select(s.x_LMD[-1, :m], 0, where, out=picked)
        ops.rms_norm(picked, base.norm, base.shape.eps, hidden)
        for start in range(0, p, HEAD_ROWS):
            some = slice(start, min(start + HEAD_ROWS, p))
            logits = s.logits_PV[: some.stop - start]
            torch.mm(hidden[some], base.head.t(), out=logits)
            ops.loss_backward(logits, s.target_P[some], s.share, s.loss_P[some])
            torch.mm(logits, base.head, out=dhidden[some])
        dpicked = s.dpicked_PD[:p].zero_()
        ops.add_rms_norm_backward(dhidden, picked, base.norm, base.shape.eps, dpicked)
        s.g_MD[:m].zero_()
        s.g_MD[:m, :d].index_copy_(0, where, dpicked)  # the last place, more than once: its gradient is 0 each time

    def _backward(self, s: Space, i: int, m: int) -> None:
        """g, the gradient at the layer's result, becomes the one at its input."""
        w, kept, ops, made = self.base.stack, s.kept, self.ops, self.products
        shape, d = self.base.shape, self.base.shape.hidden
        k = 0 if self.size.recompute else i
        g, dnormed = s.g_MD[:m], s.dnormed_MD[:m]
        gd, dt = g[:, :d], g[:, d:]

        middle, normed, gate_up = kept.middle_KMD[k, :m], kept.normed2_KMD[k, :m], kept.gate_up_KMG[k, :m]
        torch.mm(gd, w.b_down_LDR[i], out=dt)
        ops.mm_wide(gd.t(), kept.t_down_LMR[i, :m], made.b_down[i])
        dinner = torch.mm(g, w.down_LDF[i], out=s.inner_MF[:m])
        ops.swiglu_backward(gate_up, dinner, normed[:, d:], dt, made.b_gate_up[i], made.a_down[i])
        both = dnormed[:, : w.gate_up_LGD.shape[2]]
        torch.mm(gate_up, w.gate_up_LGD[i], out=both)
        ops.mm_wide(both[:, d:].t(), normed[:, :d], made.a_gate_up[i])
        both[:, :d].addmm_(both[:, d:], w.a_gate_up_LRD[i])
        ops.add_rms_norm_backward(both[:, :d], middle, w.norm2_LD[i], shape.eps, gd)

        attended, qkv, normed = kept.attended_KMQ[k, :m], kept.qkv_KMX[k, :m], kept.normed1_KMD[k, :m]
        torch.mm(gd, w.b_o_LDR[i], out=dt)
        ops.mm_wide(gd.t(), kept.t_o_KMR[k, :m], made.b_o[i])
        ops.mm_wide(dt.t(), attended, made.a_o[i])
        dattended = torch.mm(g, w.o_LDQ[i], out=s.dattended_MQ[:m])
        dqkv, lse = s.dqkv_MX[:m], kept.lse_KMH[k, :m]
        ops.attend_backward(qkv, s.segments[m], shape, attended, lse, s.delta_MH[:m], dattended, dqkv)
        ops.rotate(dqkv, s.cos_Md[:m], s.sin_Md[:m], shape, back=True)
        ops.mm_wide(dqkv.t(), normed[:, d:], made.b_qkv[i])
        if self.base.first + i == 0:  # nothing before it is trained
            torch.mm(dqkv, w.qkv_LXD[i, :, d:], out=dnormed[:, d:])
            ops.mm_wide(dnormed[:, d:].t(), normed[:, :d], made.a_qkv[i])
            return
        torch.mm(dqkv, w.qkv_LXD[i], out=dnormed)
        ops.mm_wide(dnormed[:, d:].t(), normed[:, :d], made.a_qkv[i])
        dnormed[:, :d].addmm_(dnormed[:, d:], w.a_qkv_LRD[i])
        ops.add_rms_norm_backward(dnormed[:, :d], s.x_LMD[i, :m], w.norm1_LD[i], shape.eps, gd)


def ops_for(base: Base) -> Any:
    """One kernel each on a GPU in half precision; plain torch elsewhere."""
    if base.device.type == "cuda" and base.dtype in (torch.bfloat16, torch.float16):
        from lib.lora import triton_ops

        return triton_ops
    from lib.lora import plain_ops

    return plain_ops
