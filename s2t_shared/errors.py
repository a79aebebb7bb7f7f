"""The errors that a user can cause or mend, as one tree.

    S2TError
      InvalidRequestError        one request or input line is wrong
      ConfigError                a setting, flag or file of the operator is wrong
        TokenizerMismatchError   SLM and LLM do not share a tokenizer
      ModelLoadError             a model folder is missing, broken or not supported
      ModelFailedError           a model's runtime has failed while it ran
      VersionError               a local-selector version is corrupt or does not fit
        VersionNotFoundError
      EvaluationSplitError       calibration, harvest or training was pointed at an evaluation split
      OverloadedError            no room now; try again
      SelectorUnavailableError   the LLM cannot be asked (the engine degrades instead of failing)
      ServiceUnavailableError    the service cannot be reached or is not ready
        ProposerLostError        the proposer that answered has died
      StoreError                 Redis or the label lake cannot be used
      DeadlineExceededError      the request's own deadline passed
      UnauthenticatedError       no token, or a wrong one
      PermissionDeniedError      a token whose role does not allow the call

A message says what is wrong, where, and how to mend it. Bugs are `assert`s, never one of these.
`services.rpc.wire` maps each class to a gRPC status, `services.cli` to an exit status.
"""

from __future__ import annotations

RETRY_AFTER_S = 1.0  # where nothing better is known


class S2TError(Exception):
    """Base of all errors that a user can cause or mend.

    field: the field of the request that is wrong, "" where it is none or not known.
    retry_after_s: after so many seconds the same request may succeed; None: not by waiting.
    """

    field: str = ""
    retry_after_s: float | None = None

    def __init__(
        self, text: str = "", *, field: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(text)
        if field:
            self.field = field
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class InvalidRequestError(S2TError):
    """One request is wrong; the text names the field and the accepted range."""


class ConfigError(S2TError):
    """A setting of the operator is wrong; the text names the key or file and the fix."""


class TokenizerMismatchError(ConfigError):
    """SLM and LLM have different tokenizers, so that their token ids cannot be compared."""


class ModelLoadError(S2TError):
    """A model folder is missing, broken, or of an unsupported kind."""


class ModelFailedError(S2TError):
    """The runtime of a model has failed while it ran, and answers nothing more."""

    retry_after_s = RETRY_AFTER_S


class VersionError(S2TError):
    """A local-selector version is corrupt, or was made for other models."""


class VersionNotFoundError(VersionError):
    """No published version has this name."""


class EvaluationSplitError(S2TError):
    """Calibration, harvest or training was pointed at an evaluation split."""


class OverloadedError(S2TError):
    """The service has no room for the request now; retrying later can succeed."""

    retry_after_s = RETRY_AFTER_S


class SelectorUnavailableError(S2TError):
    """No selector (LLM) answered in time."""

    retry_after_s = RETRY_AFTER_S


class ServiceUnavailableError(S2TError):
    """The service cannot be reached, is not ready, or broke off; the request can be sent again."""

    retry_after_s = RETRY_AFTER_S


class ProposerLostError(ServiceUnavailableError):
    """The proposer that answered has died. Another one can go on."""

    retry_after_s = 0.1


class StoreError(S2TError):
    """Redis or the label lake cannot be used."""

    retry_after_s = RETRY_AFTER_S


class DeadlineExceededError(S2TError):
    """The deadline that the request carried has passed."""


class UnauthenticatedError(S2TError):
    """The caller gave no valid token."""


class PermissionDeniedError(S2TError):
    """The caller's token is valid, and its role does not allow the call."""
