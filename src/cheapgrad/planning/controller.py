"""The controller: keeps the noise of sketched rows at a target while a model trains."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from cheapgrad.convert import Handle
from cheapgrad.errors import ControlError, check_count, check_fraction
from cheapgrad.planning.adam_correction import adam_learning_rate_factor
from cheapgrad.planning.controller_claim import Claim
from cheapgrad.planning.controller_law import (
    NoiseSchedule,
    check_noise,
    find_shift,
    predict_noise,
    round_keep,
    shift_keep,
)
from cheapgrad.planning.controller_memory import recall, remember
from cheapgrad.planning.controller_pass import TOTALS
from cheapgrad.planning.controller_settings import describe_settings
from cheapgrad.planning.controller_share import has_ranks, share_trial
from cheapgrad.planning.controller_state import ControlRecord, read_state
from cheapgrad.planning.controller_trial import Look, Trial, TrialDesign
from cheapgrad.planning.controller_units import StepUnits
from cheapgrad.sketch import LayerShape, RowSample

# A trial at each of the first steps, then at every second one, then at every `every`-th.
_DENSE_STEPS, _HALF_DENSE_STEPS = 8, 32
# Later their period grows with the training: at step n it is no longer than n over this, or than two steps.
_STEPS_PER_PERIOD, _SPARSE_PERIOD = 24, 4
# What is known before a trial: noise over the predicted noise, and how many trials' worth that is.
_USUAL_CALIBRATION, _USUAL_NOISE = 1.2, 0.5
_CALIBRATIONS, _CALIBRATIONS_IN_UNITS = (0.25, 8.0), (1 / 64, 16.0)
# Memory: of the calibration, which moves slowly, in trials; of the layers' own noise, in looks.
_CALIBRATION_TRIALS, _LAYER_LOOKS = 16, 5
# The sampled half of a trial is noisier than the target by this factor, so that the difference can be seen; at first,
# when trials are frequent, by the factor at which half a batch adds as much as the target.
_TRIAL_FACTOR, _DENSE_TRIAL_FACTOR = 4.0, 2.0
# Memory of the trend of cotangents' sizes; how many times the trend a look may weigh, as a logarithm.
_TREND_LOOKS, _LARGEST_WEIGHT = 4, 2.0
_MISSES_ALLOWED = 3
# Looks between two trials: at the draws' curves, and at the layers' noise.
_CURVE_LOOKS_BETWEEN, _LAYER_LOOKS_BETWEEN = 16, 4
# Budgets of fewer rows than this, kept or left out, take turns between two whole numbers.
_FEW_ROWS = 64
# What torch takes for a seed.
_SEEDS = 2**63


class Controller:
    r"""Keep added variance at a fraction of the mini-batch variance, by moving the keep fractions of row samples.

    In a trial, every `every`-th step, half of the examples keep all their rows. Halves are chosen by fair coins between
    examples of nearly equal cotangents, so the mean squared size of the others' weight gradients is larger by the
    added variance alone, however many layers it came through. No pass is added and the gradient stays unbiased. The
    difference calibrates what the draws' own law ``Σ (1/p_n - 1) s_n²`` predicts from the same cotangents for every
    budget; all budgets are then shifted together, by a common factor of their odds.

    Args:
        handle: of a model with `RowSample` on the cotangent of some layers. A controller made before, for any handle
            of this conversion, is relieved, and the keep fractions are those of the conversion again.
        noise: target ω = added variance ÷ mini-batch variance, or a `NoiseSchedule`.
        every: steps between trials, at least 1, after the first ones, which follow closely.
        least_keep: no keep fraction falls below it, in (0, 1].
        seed: of the coins; the same on every rank.
        process_group: whose ranks share what they measured, as their gradients are averaged; the default group if
            there is one.
        optimizer: Adam, AdamW, NAdam, RAdam or RMSprop, as for `cheapgrad.plan`: ω is then in units of its steps, each
            weight's gradient divided by the root of its mean second moment. Nothing is measured before its first step.

    **Law** Call ``step()`` after each optimizer step. The difference of the halves is unbiased for the variance of
    sketched rows on the weights of linear layers, where examples do not see each other (batch norm) and rows come
    example by example. It does not see the noise of stored codes, nor that on norms, biases and convolutions. What is
    kept is the mean over a window of trials, with a weak pull to `1.2` times the law's prediction. Passes with a
    gradient that is not finite are left out, and `obstacle` says so.

    Attributes:
        history: a record after each trial that measured something.
        obstacle: why the latest look was left out, or in part, or what it could not tell; an empty string otherwise.

    Raises:
        ControlError: `handle` is no `Handle`, no layer samples rows of its cotangent, or a number out of range.
        BudgetError: if `every` or `least_keep` is out of range.
        ConversionError: if the handle was reverted.
        OptimizerStateError: if `optimizer` is no such optimizer, or does not hold the weights under control. Whatever
            is raised, a controller made before stays in charge.

    >>> import torch, cheapgrad
    >>> from cheapgrad.sketch import RowSample
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
    >>> handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(keep=0.5)))
    >>> controller = cheapgrad.Controller(handle, noise=0.05)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(64, 256)).square().mean().backward()
    ...     optimizer.step()
    ...     controller.step()
    >>> controller.keep > 0.5
    True

    References:
        Variance-controlled adaptive sampling (arXiv:2402.17227) keeps the same ratio by extra passes every few hundred
        steps. Ours compares halves of a batch, adds no pass, and needs no trainer.
    """

    def __init__(
        self,
        handle: Handle,
        noise: float | NoiseSchedule = 0.05,
        *,
        every: int = 64,
        least_keep: float = 0.05,
        seed: int = 0,
        process_group: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._schedule = noise if isinstance(noise, NoiseSchedule) else None
        self._noise = noise.first if isinstance(noise, NoiseSchedule) else check_noise("noise", noise)
        self._every = check_count("every", every)
        self._least_keep = check_fraction("least_keep", least_keep)
        self._seed = check_count("seed", seed, minimum=0)
        self._settings = describe_settings(
            self._schedule or self._noise, self._every, self._least_keep, self._seed, optimizer is not None
        )
        self._handle = handle
        self._group = process_group
        self._claim = Claim(handle)
        self._base = self._claim.strategies
        self._units = None if optimizer is None else StepUnits(optimizer, self._claim.layers())
        self._factors: dict[str, float] = {} if self._units is None else self._units.read()
        self._step = 0
        self._shift = 0.0
        self._misses = 0
        self._measured: float | None = None
        self._totals = torch.zeros(len(TOTALS), dtype=torch.float64)
        usual = {"gain": _USUAL_CALIBRATION * _USUAL_NOISE, "predicted_gain": _USUAL_NOISE}
        for name, value in {**usual, "plain_gain": usual["gain"]}.items():
            self._totals[TOTALS.index(name)] = value
        self._rows: dict[str, int] = {}
        self._log_size: float | None = None
        self._curves: dict[str, Tensor] = {}
        self._layers: dict[str, Tensor] = {}
        self._followers: frozenset[str] = frozenset()
        self._trial: Trial | None = None
        self.history: list[ControlRecord] = []
        self.obstacle = ""
        self._prepare()
        # Last, so that a controller that could not be made has relieved nobody.
        self._claim.take()

    @property
    def target(self) -> float:
        """ω asked for at the present step."""
        return self._noise if self._schedule is None else self._schedule.target(self._step)

    @property
    def noise(self) -> float | None:
        """Estimate of ω at the budgets that were chosen last; None before the first trial.

        They are chosen so that it is the target, less what trials add, unless no budget in range reaches it; what was
        found at the budgets before is in `history`.
        """
        return self._measured

    @property
    def keeps(self) -> dict[str, float]:
        """Keep fraction of every controlled layer, outside of trials."""
        return self._keeps(self._shift)

    @property
    def strategies(self) -> dict[str, RowSample]:
        """Strategies at `keeps`, all else as converted: for `Handle.replace_strategies`, to go on without control."""
        return {name: dataclasses.replace(self._base[name], keep=keep) for name, keep in self.keeps.items()}

    @property
    def keep(self) -> float:
        """Mean of `keeps`."""
        return sum(self.keeps.values()) / len(self._base)

    @property
    def calibration(self) -> float:
        """Measured noise over what the draws alone predict; near 1 where the noise of a layer reaches no other.

        In units of an optimizer's steps it also turns one unit into the other: what draws predict is the mean of both.
        """
        return self._calibrate("gain")

    def _calibrate(self, gain: str) -> float:
        measured, predicted = self._total(gain), self._total("predicted_gain")
        # Predictions are between units that may be far apart.
        least, most = _CALIBRATIONS if self._units is None else _CALIBRATIONS_IN_UNITS
        return min(max(measured / predicted, least), most)

    def _say_limit(self) -> str:
        """Return that the calibration would be beyond its limit, if it is."""
        ratio, used = self._total("gain") / self._total("predicted_gain"), self.calibration
        if ratio == used:
            return ""
        side = "larger" if ratio > used else "smaller"
        return f"noise grows {ratio:.3g} times on its way down, and {used:.3g} is used: it may be {side} than estimated"

    def _total(self, name: str) -> float:
        return float(self._totals[TOTALS.index(name)])

    @property
    def adam_learning_rate_factor(self) -> float:
        """Factor that undoes what the added variance takes from Adam's step; see `adam_learning_rate_factor`."""
        return adam_learning_rate_factor(self._measured or 0.0)

    def step(self) -> None:
        """Take in what the backward passes since the last call showed, and set the budgets of the next step.

        Raises:
            ControlError: if several trials in a row showed nothing; the message says why. If another controller was
                made for the model since, or a layer is gone; the message names it.
            ConversionError: if the handle was reverted.
            OptimizerStateError: if the optimizer keeps no second moments, or has made no step in many.
        """
        sizes = self._claim.seen_sizes()
        rows = {name: shape.rows for name, shape in sizes.items() if isinstance(shape, LayerShape)}
        if not has_ranks():
            self._rows = rows
        if self._trial is not None:
            self._take_in(self._trial, rows)
        self._step += 1
        if self._units is not None and (not self._factors or self._look() in (Look.HALVES, Look.LAYERS)):
            self._factors = self._units.read()
            if not self._factors:
                self.obstacle = "the optimizer has made no step yet, so that its steps have no unit"
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, as tensors and plain data.

        To be taken after `step`; with the model's, the optimizer's and torch's random state, training goes on bit for
        bit as it would have.
        """
        return {
            "step": self._step,
            "shift": self._shift,
            "misses": self._misses,
            "noise": self._measured,
            "log_size": self._log_size,
            "totals": self._totals.clone(),
            "rows": dict(self._rows),
            "curves": {layer: curve.clone() for layer, curve in self._curves.items()},
            "layers": {layer: pair.clone() for layer, pair in self._layers.items()},
            "followers": sorted(self._followers),
            "factors": dict(self._factors),
            "keeps": {layer: strategy.keep for layer, strategy in self._base.items()},
            "settings": dict(self._settings),
            "history": [dataclasses.asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, with the same arguments and a handle made by the same rules.

        Raises:
            ControlError: if the state is of other layers or arguments, damaged, or no state of a controller; nothing
                is loaded then. If another controller was made for the model since, or a layer is gone.
            ConversionError: if the handle was reverted.
        """
        self._claim.seen_sizes()
        weights = frozenset() if self._units is None else self._units.names
        keeps = {layer: strategy.keep for layer, strategy in self._base.items()}
        read = read_state(state, self._settings, keeps, weights)
        self._step, self._shift, self._misses = read.step, read.shift, read.misses
        self._measured, self._log_size = read.noise, read.log_size
        self._totals, self._rows = read.totals, read.rows
        self._curves, self._layers, self._followers = read.curves, read.layers, read.followers
        self._factors = read.factors
        self.history = read.history
        self._prepare()

    def _keeps(self, shift: float) -> dict[str, float]:
        return {name: shift_keep(value.keep, shift, self._least_keep) for name, value in self._base.items()}

    def _look(self) -> Look | None:
        """Return what is looked at in the present step."""
        if self._units is not None and not self._factors:
            return None
        if self._misses or self._step < _DENSE_STEPS:
            return Look.HALVES
        if self._step < _HALF_DENSE_STEPS:
            return Look.HALVES if self._step % 2 == 0 else Look.LAYERS
        period = self._period()
        for look, looks in ((Look.HALVES, 1), (Look.LAYERS, _LAYER_LOOKS_BETWEEN), (Look.CURVES, _CURVE_LOOKS_BETWEEN)):
            if self._step % max(1, period // looks) == 0:
                return look
        return None

    def _period(self) -> int:
        """Return the steps between trials: a power of two that grows with the training, up to `every`."""
        return min(self._every, 2 ** max(1, (self._step // _STEPS_PER_PERIOD).bit_length() - 1))

    def _trial_factor(self) -> float:
        return _DENSE_TRIAL_FACTOR if self._period() < _SPARSE_PERIOD else _TRIAL_FACTOR

    def _usual_target(self) -> float:
        """Return the target between trials, lower by what trials add beyond it: half of the batch, noisier."""
        return self.target * max(1 - (self._trial_factor() / 2 - 1) / self._period(), 0.5)

    def _prepare(self) -> None:
        """Set the strategies of the next step."""
        look, keeps = self._look(), self.keeps
        self._trial, designs = None, {name: value.design for name, value in self._base.items()}
        if look is not None:
            layers = frozenset(self._curves) if look is Look.CURVES else None
            seed = (self._seed + 0x9E3779B1 * (self._step + 1)) % _SEEDS
            find = (lambda *_: 1.0) if self._units is None else self._units.resolve(self._factors)
            self._trial = Trial(seed, self._claim.count_examples, look, layers, find)
            designs = {name: TrialDesign(design, self._trial, name, keeps[name]) for name, design in designs.items()}
        if look is Look.HALVES and self._curves:
            keeps = self._keeps(self._find_shift(self._trial_factor() * self.target))
        present = self._handle.strategies()
        wanted = {
            name: dataclasses.replace(value, keep=self._round(name, keeps[name], place), design=designs[name])
            for place, (name, value) in enumerate(self._base.items())
        }
        if self._trial is not None or any(present.get(name) != value for name, value in wanted.items()):
            self._handle.replace_strategies(wanted)

    def _round(self, name: str, keep: float, place: int) -> float:
        """Return a whole number of rows as a fraction, where a fraction of N rows is a coarse thing."""
        rows = self._rows.get(name)
        is_coarse = rows is not None and rows * min(keep, 1 - keep) < _FEW_ROWS
        return round_keep(keep, rows, self._step, place) if is_coarse else keep

    def _take_in(self, trial: Trial, rows: dict[str, int]) -> None:
        device = next(self._handle.model.parameters()).device
        shared = share_trial(trial, rows, list(self._base), device, self._group)
        totals, curves, layers = shared.totals, shared.curves, shared.layers
        remarks = () if self._units is None else self._units.remarks
        self._rows, self.obstacle = shared.rows, "; ".join(filter(None, (trial.obstacle, *remarks)))
        compares = trial.look is Look.HALVES
        if compares and totals[0] == 0:
            self._miss(
                "Call controller.step() once after each optimizer step, train eagerly, in training mode and not within "
                "handle.exact(), with the batch as the first axis; to compile, give handle.replace_strategies the "
                "controller.strategies of an eager run"
            )
            return
        if compares:
            self._followers = shared.followers
        curves, layers = self._without_followers(curves), self._without_followers(layers)
        if not curves:
            return
        if compares and shared.seen.isdisjoint(layers):
            # Layers below that draw for themselves are not seen in every trial.
            self.obstacle = (
                f"the rows drawn at {', '.join(layers)} are in the gradient of no linear weight that is trained there"
            )
            if self._measured is None:
                self._miss("Leave frozen layers above trained ones exact, by rules that do not match them")
            return
        if compares:
            self._misses = 0
            self._totals = self._totals * (1 - 1 / _CALIBRATION_TRIALS) + totals
            self._curves = self._without_followers(self._curves)
            self._layers = self._without_followers(self._layers)
        self._add_layers(layers, compares, float(totals[0]))
        self._add_curves(curves)
        used = self._noise_at(self._shift)
        self._shift = self._find_shift(self._usual_target())
        self._measured = self._noise_at(self._shift)
        if compares:
            self.obstacle = "; ".join(filter(None, (self.obstacle, self._say_limit())))
            self.history.append(ControlRecord(self._step, self.target, used, self.calibration, self.keep))

    def _miss(self, advice: str) -> None:
        self._misses += 1
        if self._misses >= _MISSES_ALLOWED:
            raise ControlError(f"{self._misses} trials in a row measured nothing: {self.obstacle}. {advice}")

    def _without_followers(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {layer: value for layer, value in found.items() if layer not in self._followers}

    def _add_layers(self, layers: dict[str, Tensor], compares: bool, passes: float) -> None:
        """Add the layers' own noise, summed over passes; where no example kept all rows, gradients had noise too."""
        plain, in_units = (sum(float(shares[way]) for shares in layers.values()) / max(passes, 1.0) for way in (0, 1))
        # Each is relative to sizes with noise of its own; what counts is their mean.
        total = (self._calibrate("plain_gain") * plain + self.calibration * in_units) / 2
        scale = 1.0 if compares else 1 / (1 - min(total, 0.8))
        kept = 1 - 1 / _LAYER_LOOKS
        for layer, shares in layers.items():
            scaled = shares * torch.tensor([scale, scale, 1.0], dtype=torch.float64)
            self._layers[layer] = scaled + kept * self._layers[layer] if layer in self._layers else scaled

    def _add_curves(self, curves: dict[str, Tensor]) -> None:
        """Add curves to those of earlier trials, each in units of how large cotangents are at the time.

        Batches keep their weight in the mean over batches, while the trend, by orders of magnitude in a training, is
        taken out.
        """
        log_size = math.log(max(sum(float(curve[-1]) for curve in curves.values()), 1e-300))
        trend = log_size if self._log_size is None else self._log_size
        self._log_size = trend + (log_size - trend) / _TREND_LOOKS
        for layer, curve in curves.items():
            scaled = curve * math.exp(min(log_size - trend, _LARGEST_WEIGHT) - log_size)
            self._curves[layer] = remember(self._curves.get(layer), scaled)

    def _per_prediction(self) -> float:
        """Return ω over what the draws predict: calibrated, less what fixed sizes spare, per mini-batch variance."""
        exact, mean, shared, predicted = map(self._total, ("exact", "mean", "shared", "predicted_noise"))
        if not (exact > 0 and predicted > 0):
            return self.calibration
        signal = min(max(mean / exact, 0.0), 0.9)
        return max(self.calibration - max(shared, 0.0) / predicted, 0.1) / (1 - signal)

    def _weights(self) -> dict[str, float]:
        """Return the noise of each layer's draw in the weights' gradients, per relative variance of the draw."""
        return {
            layer: float(shares[:2].mean() / shares[2]) if shares[2] > 0 else 1 / len(self._layers)
            for layer, shares in self._layers.items()
        }

    def _known_curves(self) -> dict[str, Tensor]:
        return {layer: recall(memory) for layer, memory in self._curves.items()}

    def _noise_at(self, shift: float) -> float:
        return self._per_prediction() * predict_noise(self._known_curves(), self._keeps(shift), self._weights())

    def _find_shift(self, target: float) -> float:
        keeps = {layer: self._base[layer].keep for layer in self._curves}
        return find_shift(
            self._known_curves(), keeps, self._weights(), target / self._per_prediction(), self._least_keep
        )
