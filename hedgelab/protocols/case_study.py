"""What a single new latent took from the old ones: the page of a hedging degree with N = 1 (SPEC section 5)."""

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.data.llm import LLMDataModule
from hedgelab.saes import SAE

_SHOWN_LATENTS = 8
_SHOWN_TOKENS = 10
_SHOWN_CONTEXTS = 5
_READ_CONTEXTS = 128
_AROUND = 12

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22272e; max-width: 72em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em; border-top: 1px solid #d9dde2; padding-top: 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em .9em .15em 0; text-align: right }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 2em } .quiet { color: #6b7480 }
.text { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; margin: .3em 0 }
.token { background: #f2f4f6; border-radius: 3px; padding: 0 .3em; margin-right: .3em; font-family: ui-monospace, monospace }
"""


class Snippet(NamedTuple):
    """A token on which a latent fires, the text before and after it, and how strongly the latent fires there."""

    before: str
    token: str
    after: str
    activation: float


class MovedLatent(NamedTuple):
    """An old latent and how it moved when the new one came."""

    latent: int
    toward: float  # component of Δ_i along the new latent's direction
    before: float  # cosine with the new latent's row, in the control
    after: float  # the same in the extended SAE
    cosine: float  # between its own rows in both


def most_moved(control: Tensor, extended: Tensor, count: int = _SHOWN_LATENTS) -> list[MovedLatent]:
    """The old latents of decoders ``[W, d_in]`` and ``[W + 1, d_in]`` that moved furthest along the new one's direction."""
    rows = normalize(extended.detach().double(), dim=1)
    old, moved, new = normalize(control.detach().double(), dim=1), rows[:-1], rows[-1]
    toward = (moved - old) @ new
    return [
        MovedLatent(i, float(toward[i]), float(old[i] @ new), float(moved[i] @ new), float(old[i] @ moved[i]))
        for i in toward.abs().argsort(descending=True)[:count].tolist()
    ]


class LLMProbe:
    """Reads directions through a language model's unembedding, and latents on evenly spaced contexts of its text."""

    def __init__(self, data: LLMDataModule) -> None:
        self._tokenizer = data.files.tokenizer()
        model: Any = data.files.causal_lm(data.model_dtype, data.attention)
        output = model.get_output_embeddings().weight.detach().float()
        self._unembedding: Tensor | None = output if output.shape[1] == data.d_in else None
        chosen = torch.linspace(0, len(data.contexts.tokens) - 1, min(_READ_CONTEXTS, len(data.contexts.tokens))).long()
        self._tokens, usable = data.contexts.tokens[chosen], data.contexts.usable(data.skip_first)[chosen]
        rows = data.harvester.rows(self._tokens, usable).float()
        self._x, self._places = data.normalised(rows).x, usable.nonzero()

    def promoted(self, direction: Tensor) -> list[str]:
        """Tokens whose logits a direction raises most; none where the hook is no residual stream."""
        if self._unembedding is None:
            return []
        best = (self._unembedding @ direction.detach().to(self._unembedding)).topk(_SHOWN_TOKENS).indices
        return [self._text(best[i : i + 1]) for i in range(len(best))]

    @torch.no_grad()
    def contexts(self, sae: SAE, latents: Sequence[int]) -> dict[int, list[Snippet]]:
        """Where each of the latents fires most, at most once a context."""
        rows = torch.split(self._x, 1024)  # where the language model is, maybe on a GPU; the SAE may be elsewhere
        parts = [sae.encode(x.to(sae.W_dec.device)).to_dense()[:, list(latents)] for x in rows]
        activations = torch.cat(parts).cpu()
        found: dict[int, list[Snippet]] = {}
        for i, latent in enumerate(latents):
            strongest: dict[int, Snippet] = {}
            for row in activations[:, i].argsort(descending=True).tolist():
                context, at = self._places[row].tolist()
                if len(strongest) == _SHOWN_CONTEXTS or activations[row, i] <= 0:
                    break
                if context not in strongest:
                    tokens = self._tokens[context]
                    around = tokens[max(0, at - _AROUND) : at], tokens[at : at + 1], tokens[at + 1 :][:_AROUND]
                    before, token, after = map(self._text, around)
                    strongest[context] = Snippet(before, token, after, float(activations[row, i]))
            found[latent] = list(strongest.values())
        return found

    def _text(self, tokens: Tensor) -> str:
        return str(self._tokenizer.decode(tokens.tolist()))


def page(control: SAE, extended: SAE, probe: LLMProbe | None = None) -> str:
    """The case study as one HTML page; without a probe the table of moved latents alone."""
    moved = most_moved(control.W_dec, extended.W_dec)
    lines = [
        f"<!doctype html><meta charset=utf-8><title>Case study</title><style>{_STYLE}</style>",
        f"<h1>What one new latent took from {control.d_sae} old ones</h1>",
        "<p>The old latents that moved most along the new latent's direction, once it was there to carry it. A cosine with "
        "the new latent that shrinks is a hedged component that left.</p>",
        "<table><tr><th>latent<th>motion along new<th>cosine with new, before<th>after<th>cosine before/after</tr>",
        *("<tr><td>{}<td>{:+.3f}<td>{:+.3f}<td>{:+.3f}<td>{:.3f}</tr>".format(*latent) for latent in moved),
        "</table>",
    ]
    if probe is not None:
        new, old = control.d_sae, [m.latent for m in moved]
        before, after = probe.contexts(control, old), probe.contexts(extended, [new, *old])
        lines += [f"<h2>New latent {new}</h2>", _side(probe.promoted(extended.W_dec[new]), after[new])]
        for latent in old:
            lines.append(f"<h2>Latent {latent}</h2><div class=two>")
            for name, sae, found in (("before (control)", control, before), ("after (extended)", extended, after)):
                lines.append(f"<div><b>{name}</b>{_side(probe.promoted(sae.W_dec[latent]), found[latent])}</div>")
            lines.append("</div>")
    return "\n".join(lines) + "\n"


def _side(promoted: list[str], snippets: list[Snippet]) -> str:
    """Promoted tokens and contexts of one latent in one SAE."""
    tokens = "".join(f"<span class=token>{escape(token)}</span>" for token in promoted)
    strongest = max((snippet.activation for snippet in snippets), default=1.0)
    texts = "".join(
        f"<div class=text>{escape(s.before)}"
        f'<mark style="background:rgba(209,98,42,{0.2 + 0.6 * s.activation / strongest:.2f})">{escape(s.token)}</mark>'
        f"{escape(s.after)} <span class=quiet>{s.activation:.2f}</span></div>"
        for s in snippets
    )
    return (f"<p>promotes {tokens}</p>" if tokens else "") + (texts or "<p class=quiet>fires nowhere</p>")
