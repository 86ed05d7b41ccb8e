"""A rule of one's own, as the README of the solvers shows it."""

from dataclasses import dataclass

from sparksgd.solvers.arrival_centre import GradientCentre, GradientSettings
from sparksgd.solvers.arrivals import Verdict
from sparksgd.solvers.protocol import Message, total_weight


@dataclass(frozen=True, kw_only=True)
class FadingSettings(GradientSettings):
    """The keys of `Fading`."""

    decay: float = 0.9
    """What a gradient counts for each step that it is late."""


class Fading(GradientCentre):
    """A gradient of staleness tau counts decay ** tau."""

    Settings = FadingSettings

    def __init__(self, flat, settings, experiment):  # as a user writes it
        super().__init__(flat, settings, experiment)
        self._decay = settings.decay

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Step along a gradient that counts less the later it is."""
        tau = self.staleness_of(version_read)
        gradient = message.vectors["gradient"] * self._decay**tau
        step = self.step_on(message, gradient, total_weight(message), [shard], [tau])
        return Verdict(answers={shard: self.answer()}, steps=(step,))


class Holding(GradientCentre):
    """Holds every shard back, and makes no step."""

    def arrived(self, shard: int, message: Message, version_read: int) -> Verdict:
        """Answer nobody."""
        return Verdict()


class NoRule:
    """Is no rule."""
