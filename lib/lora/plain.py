"""Training by transformers, peft and torch's own AdamW, as one would write it down: the yardstick of the fast trainer,
and what trains a model of a family that the fast one does not know."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from lib.lora.peft_form import MOMENTS, first_A, targets_in, weight_name
from lib.lora.recipe import Lora
from lib.lora.rows import Row
from lib.models.load import load_model


class PlainTrainer:
    def __init__(self, model_path: str, lora: Lora, dtype: str, device: torch.device, micro_rows: int = 10) -> None:
        self.lora, self.device, self.micro_rows = lora, device, micro_rows
        base = load_model(model_path, dtype, "sdpa", [device])
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            target_modules=list(targets_in(model_path)),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base, config)
        # bfloat16 products under float32 adapters
        self.mixed = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        for name, module in self.model.named_modules():
            module.train("lora_dropout" in name)
        self.parameters = dict(self._parameters())
        self.begin(0)

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name.replace(".default.weight", ".weight"), parameter

    def begin(self, seed: int) -> None:
        self.seed = seed
        for module in sorted({name.split(".lora_")[0] for name in self.parameters}):
            module = module.removeprefix("base_model.model.")
            a, b = (self.parameters[weight_name(module, matrix)] for matrix in "AB")
            a.data.copy_(first_A(seed, module, *a.shape))
            b.data.zero_()
        how = {"betas": self.lora.betas, "eps": self.lora.eps, "weight_decay": self.lora.weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, **how)
        for p in self.parameters.values():
            self.optimizer.state[p] = {
                "step": torch.zeros(()),
                **{key: torch.zeros_like(p) for key in MOMENTS.values()},
            }

    def step(
        self, rows: Sequence[Row], learning_rate: float, number: int, following: Sequence[Row] = ()
    ) -> dict[str, float]:
        scored, loss = sum(row.scored for row in rows), torch.zeros((), dtype=torch.float64)
        with self._dropout(number):
            for start in range(0, len(rows), self.micro_rows):
                part = self._loss(rows[start : start + self.micro_rows]) / scored
                part.backward()
                loss += part.detach().cpu()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.lora.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for adam in self.optimizer.state.values():
            adam["step"].fill_(number - 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(len(row.ids) for row in rows)
        return {"loss": loss.item(), "grad_norm": norm.item(), "tokens": tokens, "scored": scored}

    def _loss(self, rows: Sequence[Row]) -> torch.Tensor:
        """Summed over the scored tokens."""
        longest = max(len(row.ids) for row in rows)
        ids_RT = torch.zeros(len(rows), longest, dtype=torch.long)
        real_RT, scored_RT = torch.zeros_like(ids_RT), torch.zeros_like(ids_RT, dtype=torch.bool)
        for r, row in enumerate(rows):
            n = len(row.ids)
            ids_RT[r, :n], real_RT[r, :n] = torch.tensor(row.ids), 1
            scored_RT[r, row.first : n] = True
        ids_RT, real_RT, scored_RT = (x.to(self.device) for x in (ids_RT, real_RT, scored_RT))
        with self.mixed:
            logits_RTV = self.model(input_ids=ids_RT, attention_mask=real_RT, use_cache=False).logits
        logits_SV = logits_RTV[:, :-1][scored_RT[:, 1:]]
        wide = torch.promote_types(logits_SV.dtype, torch.float32)
        return cross_entropy(logits_SV.to(wide), ids_RT[:, 1:][scored_RT[:, 1:]], reduction="sum")

    @contextmanager
    def _dropout(self, number: int) -> Iterator[None]:
        """The same elements in the same step, whatever was drawn before."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + number)
            yield

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._tensors():
            tensor.copy_(state[name])

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, parameter
            for prefix, key in MOMENTS.items():
                yield prefix + name, self.optimizer.state[parameter][key]
