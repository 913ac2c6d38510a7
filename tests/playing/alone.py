"""An environment whose sessions hold something that there is one of."""


class Alone:
    """An environment of which one session at a time has what it needs."""

    def __init__(self, environment) -> None:
        self._environment, self._owner = environment, None

    def start(self, task):
        outer = self

        class One(type(session := self._environment.start(task))):
            holds = property(lambda self: outer._owner is self)

            def ready(self, turn) -> bool:
                outer._owner = outer._owner or self
                return self.holds

            def close(self) -> None:
                outer._owner = None if self.holds else outer._owner

        session.__class__ = One
        return session
