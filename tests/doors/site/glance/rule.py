from dataclasses import dataclass

from vlmattn.decoding import Branch, Contrast, ContrastiveDecoding, Decoding, option, register


@register("greyness", paper="none", code="none", faithful="experimental", parts="decoding", cost="the prompt twice",
          presets={"greyness": ("moves away from a grey image", {})})  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class Greyness(Decoding):
    """Move away from what the model says about a grey image:  s = (1 + alpha) l - alpha l'."""

    alpha: float = option(3.0, 0, 10, "strength of the contrast")

    def contrast(self, anatomy):
        return ContrastiveDecoding((Branch(name="grey", image="blank"),), Contrast((self.alpha,)))
