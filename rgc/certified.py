"""Does a certificate hold? Its files, its original and its inputs, checked again from nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from rgc.artifact_check import compare_each
from rgc.certificate import Certificate, Check, versions
from rgc.errors import NotEquivalentError
from rgc.example import Example


@dataclass(frozen=True)
class Evidence:
    """A certificate as far as it is checked: ``checks`` on the inputs of its seeds, and ``remarks`` for the user."""

    certificate: Certificate
    checks: tuple[Check, ...] = ()
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, certificate: str | Path, artifact: str | Path) -> Evidence:
        """The certificate of just these files, before anything of them is loaded.

        Raises `InputError` for a file that is no certificate, and `NotEquivalentError`, with its name, for a file
        of the artifact that is not the one that was certified.
        """
        found = Certificate.read(Path(certificate))
        found.require_files(Path(artifact))
        then, now = found.versions, versions(found.artifact.format)
        others = [f"{name} {then[name]} (here {now[name]})" for name in now if then.get(name, now[name]) != now[name]]
        return cls(found, (), (f"certified with {', '.join(others)}",) if others else ())

    @property
    def example(self) -> Example | None:
        """The inputs of its first seed; None where it describes none."""
        checks = self.certificate.checks
        return self.certificate.draw(checks[0].seed) if checks else None

    def checked(self, source: str, model: nn.Module, loaded: nn.Module) -> Evidence:
        """With the original, from ``source``, and the loaded artifact held against it; `NotEquivalentError` if not."""
        remark = self.certificate.require_original(source, model)
        seeds = [check.seed for check in self.certificate.checks]
        found = compare_each(model, loaded, [self.certificate.draw(seed) for seed in seeds]) if seeds else []
        checks = []
        for seed, each in zip(seeds, found, strict=True):
            if each is None:
                raise NotEquivalentError(f"{source}: does not take the inputs of seed {seed}, as the certificate says")
            if not each.equal:
                raise NotEquivalentError(f"the artifact {each.reason} (seed {seed} of the certificate)")
            checks.append(Check(seed, each.deployed_error, each.original_error, each.allowed_error))
        return replace(self, checks=tuple(checks), remarks=(*self.remarks, *([remark] if remark else [])))
