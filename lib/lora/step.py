"""Forward and backward through the base, to the gradient of the adapter alone. By hand: a layer keeps what its adapters
need and no more, and nothing is made that is not used (the base's weights have no gradient, the embedding neither).

Suffixes as in base and space."""

from typing import Any

import torch

from lib.lora.adapter import Adapter
from lib.lora.base import Base
from lib.lora.batches import Micro
from lib.lora.space import HEAD_ROWS, Size, Space
from lib.models.decoder import to_device
from lib.models.tokens import must_know


class Step:
    def __init__(self, base: Base, adapter: Adapter, size: Size, rows: int) -> None:
        self.base, self.products, self.size, self.rows = base, adapter.products, size, rows
        self.space = Space(base, size)
        self.ops = ops_for(base)
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._segments: dict[int, Any] = {}

    @torch.no_grad()
    def run(self, micro: Micro, share: float) -> torch.Tensor:
        """The adapter's products of one micro-batch, and its loss, every prediction times `share`, one value."""
        self._put(micro, share)
        if self.base.device.type != "cuda":
            self._body(*micro.size)
        elif micro.size in self._captured:
            self._captured[micro.size].replay()
        else:
            self._capture(micro)
        return self.space.loss_P[: micro.size[1]].sum()

    def _capture(self, micro: Micro) -> None:
        """The first time with this size: as it is, which builds the kernels, and recorded, which computes nothing."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._body(*micro.size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._body(*micro.size)
        self._pool = graph.pool()
        self._captured[micro.size] = graph

    def _put(self, micro: Micro, share: float) -> None:
        s, base, (tokens, places) = self.space, self.base, micro.size
        must_know(int(micro.ids.min()), int(micro.ids.max()), base.shape.vocabulary)
        table, device = base.embedding, base.device
        rows = table[to_device(micro.ids, table.device)]
        s.x_LMD[0, :tokens].copy_(rows.pin_memory() if table.device != device else rows, non_blocking=True)
        positions = to_device(micro.positions, device)
        s.cos_Md[:tokens].copy_(base.rope[0][positions])
        s.sin_Md[:tokens].copy_(base.rope[1][positions])
        s.where_P[:places].copy_(to_device(micro.where, device), non_blocking=True)
        s.target_P[:places].copy_(to_device(micro.targets, device), non_blocking=True)
        s.share.fill_(share)
        if tokens not in self._segments:
            self._segments[tokens] = self.ops.Segments.empty(base.shape, tokens, self.rows, device)
        self._segments[tokens].put(micro.segments)

    def _body(self, tokens: int, places: int) -> None:
        layers = self.base.shape.layers
        for i in range(layers):
            self._forward(i, tokens)
        self._head(tokens, places)
        for i in reversed(range(layers)):
            if self.size.recompute and i != layers - 1:
                self._forward(i, tokens, again=True)
            self._backward(i, tokens)

    def _forward(self, i: int, m: int, again: bool = False) -> None:
        """`again`: all but the layer's result, which is there."""
        w, kept, ops, shape, d = self.base.stack, self.space.kept, self.ops, self.base.shape, self.base.shape.hidden
        k = 0 if self.size.recompute else i
        x, normed, middle = self.space.x_LMD[i, :m], kept.normed1_KMD[k, :m], kept.middle_KMD[k, :m]
        ops.rms_norm(x, w.norm1_LD[i], shape.eps, normed[:, :d])
        torch.mm(normed[:, :d], w.a_qkv_LRD[i].t(), out=normed[:, d:])
        qkv, attended, t = kept.qkv_KMX[k, :m], kept.attended_KMQ[k, :m], kept.t_o_KMR[k, :m]
        if w.bias_LX is None:
            torch.mm(normed, w.qkv_LXD[i].t(), out=qkv)
        else:
            torch.addmm(w.bias_LX[i], normed, w.qkv_LXD[i].t(), out=qkv)
        ops.rotate(qkv, self.space.cos_Md[:m], self.space.sin_Md[:m], shape)
        ops.attend(qkv, self._segments[m], shape, attended, kept.lse_KMH[k, :m])
        torch.mm(attended, w.o_LDQ[i, d:].t(), out=t)
        made = torch.mm(attended, w.o_LDQ[i, :d].t(), out=self.space.dnormed_MD[:m, :d])  # free on the way forward
        ops.add_adapter(x, made, t, w.b_o_LDR[i], middle)
        normed, gate_up, t = kept.normed2_KMD[k, :m], kept.gate_up_KMG[k, :m], kept.t_down_LMR[i, :m]
        ops.rms_norm(middle, w.norm2_LD[i], shape.eps, normed[:, :d])
        torch.mm(normed[:, :d], w.a_gate_up_LRD[i].t(), out=normed[:, d:])
        torch.mm(normed, w.gate_up_LGD[i].t(), out=gate_up)
        inner, out = self.space.inner_MF[:m], self.space.x_LMD[i + 1, :m]
        if not again:
            ops.swiglu(gate_up, w.down_LDF[i, d:], inner, t)
            torch.mm(inner, w.down_LDF[i, :d].t(), out=made)
            ops.add_adapter(middle, made, t, w.b_down_LDR[i], out)

    def _head(self, m: int, p: int) -> None:
        """The loss where there is one, and g, its gradient at the last layer's result."""
        s, base, ops, d = self.space, self.base, self.ops, self.base.shape.hidden
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

    def _backward(self, i: int, m: int) -> None:
        """g, the gradient at the layer's result, becomes the one at its input."""
        w, kept, ops, made = self.base.stack, self.space.kept, self.ops, self.products
        shape, d = self.base.shape, self.base.shape.hidden
        k = 0 if self.size.recompute else i
        g, dnormed = self.space.g_MD[:m], self.space.dnormed_MD[:m]
        gd, dt = g[:, :d], g[:, d:]

        middle, normed, gate_up = kept.middle_KMD[k, :m], kept.normed2_KMD[k, :m], kept.gate_up_KMG[k, :m]
        torch.mm(gd, w.b_down_LDR[i], out=dt)
        ops.mm_wide(gd.t(), kept.t_down_LMR[i, :m], made.b_down[i])
        dinner = torch.mm(g, w.down_LDF[i], out=self.space.inner_MF[:m])
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
        dattended = torch.mm(g, w.o_LDQ[i], out=self.space.dattended_MQ[:m])
        dqkv, lse = self.space.dqkv_MX[:m], kept.lse_KMH[k, :m]
        ops.attend_backward(qkv, self._segments[m], shape, attended, lse, self.space.delta_MH[:m], dattended, dqkv)
        ops.rotate(dqkv, self.space.cos_Md[:m], self.space.sin_Md[:m], shape, back=True)
        ops.mm_wide(dqkv.t(), normed[:, d:], made.b_qkv[i])
        if i == 0:  # nothing before it is trained
            torch.mm(dqkv, w.qkv_LXD[i, :, d:], out=dnormed[:, d:])
            ops.mm_wide(dnormed[:, d:].t(), normed[:, :d], made.a_qkv[i])
            return
        torch.mm(dqkv, w.qkv_LXD[i], out=dnormed)
        ops.mm_wide(dnormed[:, d:].t(), normed[:, :d], made.a_qkv[i])
        dnormed[:, :d].addmm_(dnormed[:, d:], w.a_qkv_LRD[i])
        ops.add_rms_norm_backward(dnormed[:, :d], self.space.x_LMD[i, :m], w.norm1_LD[i], shape.eps, gd)


def ops_for(base: Base) -> Any:
    """One kernel each on a GPU in half precision; plain torch elsewhere."""
    if base.device.type == "cuda" and base.dtype in (torch.bfloat16, torch.float16):
        from lib.lora import triton_ops

        return triton_ops
    from lib.lora import plain_ops

    return plain_ops
