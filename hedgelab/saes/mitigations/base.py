"""What changes how an SAE trains against hedging and absorption, in parts of their own that combine: the interface.

A mitigation is a class with some of the hooks of :class:`Mitigation`. In a config::

    model:
      class_path: MatryoshkaSAE
      init_args:
        mitigations: [{class_path: LISTA, init_args: {eta: 0.3}}, {class_path: TiltedLoss}]
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from hedgelab.errors import UserError, one_line
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Selection, Target
from hedgelab.saes.described import class_name, described
from hedgelab.saes.losses import LossTerms
from hedgelab.training.sharding import is_split

KNOWN: "dict[str, type[Mitigation]]" = {}
"""Every class of mitigations that is imported, by the name that files give it. Loading an SAE never imports anything."""


class Mitigation(nn.Module):
    """A part of an SAE's training; each hook does nothing unless a subclass defines it.

    Arguments are kept in attributes of the same name. What must survive a stop is in buffers, which keep their type whatever
    the weights become. ``sae`` is the SAE that has the mitigation; with ``needs_levels`` that must be a matryoshka SAE.

    >>> class Shrinkage(Mitigation):
    ...     def terms(self, sae, codes, decoder, target, errors):
    ...         return {"shrinkage": 0.1 * decoder.b_dec.square().sum()}
    >>> from hedgelab.saes import TopKSAE
    >>> import torch
    >>> list(TopKSAE(4, 8, k=2, mitigations=[Shrinkage()]).loss(torch.ones(3, 4)).terms)
    ['mse', 'shrinkage']
    """

    needs_levels: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    """Whether it works where latents are split over processes, as all do that concern targets alone."""
    fixed_shapes: ClassVar[bool] = False
    """Whether a step depends on tensors alone, whose shapes never change, so that it can be captured and replayed."""
    control: str = ""
    """What the SAE is then a control for, such as ``frozen decoder``; empty where it is none."""

    def check(self, sae: Any) -> None:
        """Refuse an SAE that does not fit with a UserError, or freeze its parameters; once, when the SAE takes it in.

        Of a flat SAE the weights are there by then, but not yet the arguments that its class adds (k, coefficients).
        """

    def encoded(self, sae: Any, x: Tensor, selection: Selection) -> Tensor:
        """What is encoded in place of ``x [..., d_in]``, in training and inference; ``sae`` is the flat SAE that encodes."""
        return x

    def codes_and_decoder(self, sae: Any, codes: Codes, decoder: Decoder) -> tuple[Codes, Decoder]:
        """What level errors are computed of: latents and decoder rows, both in one order of the latents."""
        return codes, decoder

    def order(self) -> Tensor | None:
        """The latents in the order that :meth:`codes_and_decoder` puts them in, ``[d_sae]`` int64; None for the SAE's own."""
        return None

    def target(self, sae: Any, target: Target) -> Target:
        """What level errors are computed against, and how."""
        return target

    def terms(self, sae: Any, codes: Codes, decoder: Decoder, target: Target, errors: Iterable[Tensor]) -> dict[str, Tensor]:
        """Further terms of the loss by name, scalars that carry their coefficients.

        The ``errors [batch, d_in]``, ``x_hat - x`` of each level, were computed of ``codes``, ``decoder`` and ``target``.
        """
        return {}

    def after_step(self, sae: Any, result: LossTerms) -> None:
        """What follows the optimiser's step, without gradients; ``result.codes`` have the latents in the SAE's own order."""

    def numbers(self) -> dict[str, float]:
        """Numbers that training reports at every logging interval, by full name."""
        return {}

    def config(self) -> dict[str, Any]:
        """Class name and arguments as plain JSON values; :meth:`from_config` reads it back."""
        return described(self)

    @staticmethod
    def from_config(config: Any) -> "Mitigation":
        """The mitigation that :meth:`config` described, of an imported class."""
        arguments = dict(config) if isinstance(config, Mapping) else {}
        name = arguments.pop("class", None)
        if name not in KNOWN:
            raise UserError(f"mitigations: {name!r} is no mitigation of hedgelab; if it is one of yours, import it first")
        try:
            return KNOWN[name](**arguments)
        except TypeError as error:
            raise UserError(f"mitigations: cannot be made into a {name} ({one_line(str(error))})") from error

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KNOWN[class_name(cls)] = cls

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers with the weights, but leave their type: counts and running means are not rounded with them."""
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            self._buffers[name] = value.to(getattr(self, name).device)
        return self


class Mitigations(nn.ModuleList):
    """The mitigations of one SAE, asked in their order."""

    def all(self) -> list[Mitigation]:
        """Each of them."""
        return cast(list[Mitigation], list(self))

    def check(self, sae: Any) -> None:
        """See that an SAE can have them."""
        for one in self.all():
            name = type(one).__name__
            if sum(type(other) is type(one) for other in self) > 1:
                raise UserError(f"model.mitigations: {name} is there twice; remove one")
            if one.needs_levels and not hasattr(sae, "levels"):
                raise UserError(f"model.mitigations: {name} needs levels; give it to a MatryoshkaSAE, which has them")
            try:
                one.check(sae)
            except UserError as error:  # raised anew: keys it names are the SAE's, not the mitigation's
                raise UserError(str(error)) from error

    def take_over(self, others: "Mitigations") -> None:
        """Go on with what another SAE's have counted, if they are the same."""
        if [one.config() for one in self.all()] == [one.config() for one in others.all()]:
            self.load_state_dict(others.state_dict())

    def encoded(self, sae: Any, x: Tensor, selection: Callable[[], Selection]) -> Tensor:
        """What is encoded in place of ``x``."""
        if is_split(sae.W_dec) and (unfit := [type(one).__name__ for one in self.all() if _sees_latents(type(one))]):
            raise UserError(f"model.mitigations: {unfit[0]} cannot be used where latents are split over processes; remove it")
        for one in self.all():
            x = one.encoded(sae, x, selection())
        return x

    def prepared(self, sae: Any, codes: Codes, decoder: Decoder, target: Target) -> tuple[Codes, Decoder, Target]:
        """What level errors are computed of."""
        for one in self.all():
            codes, decoder = one.codes_and_decoder(sae, codes, decoder)
            target = one.target(sae, target)
        return codes, decoder, target

    def terms(self, sae: Any, *given: Any) -> dict[str, Tensor]:
        """The terms that they add."""
        return {name: term for one in self.all() for name, term in one.terms(sae, *given).items()}

    def after_step(self, sae: Any, result: LossTerms) -> None:
        """What follows the optimiser's step."""
        for one in self.all():
            one.after_step(sae, result)

    def numbers(self) -> dict[str, float]:
        """Numbers that training reports."""
        return {name: number for one in self.all() for name, number in one.numbers().items()}


def _sees_latents(kind: type[Mitigation]) -> bool:
    """Whether a class concerns latents, and more than those of one process at a time."""
    return not kind.splits and any(
        getattr(kind, hook) is not getattr(Mitigation, hook) for hook in ("encoded", "codes_and_decoder", "terms")
    )
