"""What only the processes of a run know: a secret, and a certificate where connections are encrypted."""

from __future__ import annotations

import secrets
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sparksgd.errors import ConfigError
from sparksgd.storage.scratch import scratch_folder

__all__ = ["Credentials"]

_SECRET_BYTES = 32
_CLOCKS_DIFFER = timedelta(days=1)
_LONGEST_RUN = timedelta(days=365)


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What only the processes of a run know; it is sent only through Spark's own channels."""

    secret: bytes = field(repr=False)
    """Key of every proof."""

    pem: bytes | None = field(default=None, repr=False)
    """Private key and certificate, for TLS; None: no encryption."""

    @classmethod
    def new(cls, *, encrypt: bool) -> Credentials:
        """Return new credentials.

        Raises:
            ConfigError: encryption is wanted, but the package that makes certificates is not installed.
        """
        return cls(secret=secrets.token_bytes(_SECRET_BYTES), pem=_certificate() if encrypt else None)

    def context(self, *, listens: bool) -> ssl.SSLContext | None:
        """Return the TLS context of one end; both show the run's certificate, and accept no other."""
        if self.pem is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the certificate is the run's, not a host's
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.pem[self.pem.index(b"-----BEGIN CERT") :].decode())
        with scratch_folder() as folder:  # ssl reads keys from files only
            file = folder / "key"
            file.write_bytes(self.pem)
            context.load_cert_chain(file)
        return context


def _certificate() -> bytes:
    """Return a new key and a self-signed certificate, as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError(
            "connections between workers are to be encrypted (engine.encrypt, or Spark's own settings), "
            "but the package cryptography is not installed: pip install 'sparksgd[tls]'"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sparksgd")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _LONGEST_RUN)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private + certificate.public_bytes(pem)
