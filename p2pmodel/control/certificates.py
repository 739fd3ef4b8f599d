"""Certificates for the control API over TCP: an authority of one's own, what it issues, and what a server needs of it.

Both ends show a certificate of the authority: whoever has a client's key may do all that the API does. P-256, because
every TLS library speaks it.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from p2pmodel.domain.errors import InvalidInput, UsageError

AUTHORITY_DAYS = 3650
ISSUED_DAYS = 730
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_SKEW = timedelta(hours=1)
_MAX_NAME = 64


@dataclass(frozen=True)
class Issued:
    """PEM, both; the key unencrypted."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class ServerTls:
    """PEM. authority: of the clients that may connect."""

    certificate: bytes
    key: bytes
    authority: bytes

    def credentials(self) -> grpc.ServerCredentials:
        """Raises InvalidInput when the three do not fit together, or have expired."""
        issued = _load(self.certificate, "server.pem")
        authority = _load(self.authority, "ca.pem")
        if _load_key(self.key, "server.key").public_key() != issued.public_key():
            raise InvalidInput("server.key is not the key of server.pem.", _AGAIN)
        try:
            issued.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise InvalidInput("server.pem is not of the authority ca.pem.", _AGAIN) from None
        if issued.not_valid_after_utc < datetime.now(UTC):
            raise InvalidInput(f"server.pem has expired on {issued.not_valid_after_utc:%Y-%m-%d}.", _AGAIN)
        return grpc.ssl_server_credentials([(self.key, self.certificate)], self.authority, require_client_auth=True)


_AGAIN = "Make them again: p2pmodel control certificates DIR"


def make_authority() -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("p2pmodel control authority")
    builder = _builder(name, name, key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    return _finish(builder, key, key)


def issue_server(authority: Issued, hosts: Sequence[str]) -> Issued:
    """hosts: names and addresses that clients reach it by, beside this machine's own. Raises UsageError."""
    names = [_alternative(host) for host in dict.fromkeys((*LOCAL_NAMES, *hosts))]
    return _issue(authority, "p2pmodel node", ExtendedKeyUsageOID.SERVER_AUTH, names)


def issue_client(authority: Issued, name: str) -> Issued:
    """name: whatever tells this client from others. Raises UsageError."""
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise UsageError(f"A client's name has 1 to {_MAX_NAME} characters.")
    return _issue(authority, name, ExtendedKeyUsageOID.CLIENT_AUTH, [])


def _issue(
    authority: Issued, subject: str, purpose: x509.ObjectIdentifier, names: Sequence[x509.GeneralName]
) -> Issued:
    issuer, signing = _load(authority.certificate, "ca.pem"), _load_key(authority.key, "ca.key")
    if signing.public_key() != issuer.public_key():
        raise InvalidInput("ca.key is not the key of ca.pem.")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(subject), issuer.subject, key.public_key(), ISSUED_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _finish(builder, key, signing)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _finish(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey
) -> Issued:
    certificate = builder.sign(by, SHA256()).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Issued(certificate, private)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(c in " :/" for c in host):
        raise UsageError(f"{host[:64]!r} is neither a host's name nor an address.", "Such as --host node.example.org")
    return x509.DNSName(host)


def _load(pem: bytes, name: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise InvalidInput(f"{name} is no certificate.", _AGAIN) from None


def _load_key(pem: bytes, name: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"{name} is no private key that can be used here.", _AGAIN)
    return key
