"""The private key of a certificate between its making and the vault: sealed for certificate workers alone.

It is made before the order is finalized, so that a worker that dies afterwards does not lose what was issued. The row of the
order holds it under a data key that only the workers' key file opens (``kit/envelope.py``): no other process can.
"""

from __future__ import annotations

from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from portico.kit import envelope
from portico.kit.envelope import Binding, Wrap
from portico.kit.keyfiles import WorkerKeys


def make(keys: WorkerKeys, order_id: str, names: list[str]) -> dict[str, bytes | str]:
    """A new key for ``names``: the columns that hold it, sealed, and its request for a certificate (DER)."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    binding = _binding(order_id, names[0])
    sealed = envelope.seal(pem, binding)
    own = envelope.wrap(sealed.data_key, binding, envelope.WORKER, keys.own.public_key())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    return {"sealed_key": sealed.content, "wrapped_key": own.wrapped, "wrap_id": own.key_id, "csr": csr}


def take(keys: WorkerKeys, order: Any) -> bytes:
    """The key of an order as PEM. Raises ``EnvelopeInvalid``."""
    binding = _binding(order.id, order.name)
    wrap = Wrap(envelope.WORKER, order.wrap_id, order.wrapped_key)
    data_key = envelope.unwrap([wrap], binding, envelope.WORKER, keys.opener)
    return envelope.open_sealed(order.sealed_key, data_key, binding)


def _binding(order_id: str, name: str) -> Binding:
    return Binding(order_id, 0, name, "")
