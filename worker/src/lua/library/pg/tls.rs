//! TLS to a server, as `sslmode` asks for it.
//!
//! Contract: `prefer` and `require` encrypt without looking at the certificate, so that it may be
//! of any kind, such as one of X.509 version 1; but with a root certificate `require` is
//! `verify-ca`. `verify-ca` wants a certificate that one of the roots has signed, or that is one of
//! them; `verify-full` also wants the server's name in it, as subjectAltName. All as in libpq
//! (PostgreSQL documentation, 34.19), but that a common name alone is not enough, and that only
//! certificates of version 3 can be verified.
//!
//! # Failure
//! A root file that can't be used is an error when the connection is declared. What is wrong with a
//! certificate is the error of the attempt to connect.

use std::path::Path;
use std::sync::Arc;

use qrelay_shared::system_error::shown;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How much of a server's certificate is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// Nothing.
    Nothing,
    /// The signer of the certificate.
    Signer,
    /// The signer of the certificate, and the server's name in it.
    SignerAndName,
}

/// The certificates of a root file.
///
/// # Errors
/// The reason why the file can't be used.
pub(super) fn read_roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| shown(&error))?;
    let certificates = certificates.collect::<Result<Vec<_>, _>>().map_err(|e| shown(&e))?;
    if certificates.is_empty() { Err("it has no certificate".into()) } else { Ok(certificates) }
}

/// Returns a connector that checks certificates against these roots.
///
/// # Errors
/// A root is no certificate.
pub(super) fn connector(
    check: Check,
    certificates: Vec<CertificateDer<'static>>,
) -> Result<MakeRustlsConnect, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in &certificates {
        roots.add(certificate.clone()).map_err(|error| error.to_string())?;
    }
    let verifier = Verifier { check, roots, certificates, provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    // Sessions that are kept before a fork would be used by every worker.
    config.resumption = Resumption::disabled();
    Ok(MakeRustlsConnect::new(config))
}

#[derive(Debug)]
struct Verifier {
    check: Check,
    roots: RootCertStore,
    /// The roots again, to find a server's own certificate among them.
    certificates: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    /// A self-signed certificate may be its own root, although, as a CA's, it can't be found to be
    /// signed by one.
    fn signer(
        &self,
        certificate: &CertificateDer<'_>,
        parsed: &ParsedCertificate<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let signed = verify_server_cert_signed_by_trust_anchor(
            parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        );
        match signed {
            Err(error) if is_about_time(&error) => Err(error),
            Err(_) if self.certificates.iter().any(|own| own == certificate) => Ok(()),
            other => other,
        }
    }
}

fn is_about_time(error: &Error) -> bool {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    matches!(
        error,
        Error::InvalidCertificate(
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }
        )
    )
}

/// The server's certificate is of X.509 version 1 or 2, which can't be verified.
#[derive(Debug, thiserror::Error)]
#[error(
    "is of X.509 version 1 or 2, which can't be verified; a certificate of version 3 can be made \
     by openssl x509 -req with -extfile"
)]
struct OldCertificate;

impl From<OldCertificate> for Error {
    fn from(error: OldCertificate) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// Whether a certificate says that its version is 3. A certificate is a sequence whose first
/// element is another sequence, whose first element is the version, with the tag 0 (RFC 5280, 4.1).
/// A certificate that is malformed counts as one of version 3, for others to judge.
fn is_version_3(certificate: &[u8]) -> bool {
    let inner = |der: &[u8]| {
        // After the tag comes the length: a byte, or the number of bytes that have it.
        let length = *der.get(1)?;
        let skipped = if length < 0x80 { 0 } else { usize::from(length & 0x7f) };
        der.get(2 + skipped..).map(<[u8]>::to_vec)
    };
    match inner(certificate).and_then(|outer| inner(&outer)).as_deref() {
        Some([0xa0, _, _, _, version, ..]) => *version == 2,
        Some([_, ..]) => false,
        _ => true,
    }
}

/// Whether there is no TLS to be had from the server: it has none, or the handshake failed.
pub(super) fn is_refusal(error: &postgres::Error) -> bool {
    let Some(cause) = std::error::Error::source(error) else { return false };
    rustls_error(cause).is_some() || cause.to_string() == "server does not support TLS"
}

fn rustls_error<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a Error> {
    cause.downcast_ref::<std::io::Error>()?.get_ref()?.downcast_ref()
}

/// Returns what is wrong with the server's certificate, if that's why there is no connection.
pub(super) fn reason(error: &postgres::Error) -> Option<String> {
    let cause = rustls_error(std::error::Error::source(error)?)?;
    let Error::InvalidCertificate(fault) = cause else { return None };
    Some(format!("the server's certificate {}", describe(fault)))
}

/// Returns what is wrong with a certificate. The library's own words are names of its types.
fn describe(fault: &CertificateError) -> String {
    use CertificateError as Fault;
    let text = match fault {
        Fault::UnknownIssuer => "is not signed by a certificate in sslrootcert",
        Fault::BadSignature => "has a signature that is not its signer's",
        Fault::BadEncoding => "is malformed",
        Fault::Expired | Fault::ExpiredContext { .. } => "has expired",
        Fault::NotValidYet | Fault::NotValidYetContext { .. } => "is not valid yet",
        Fault::InvalidPurpose | Fault::InvalidPurposeContext { .. } => {
            "is not meant for servers (extended key usage)"
        }
        Fault::NotValidForName | Fault::NotValidForNameContext { .. } => {
            "doesn't have the host's name in subjectAltName"
        }
        Fault::Other(OtherError(other)) => match other.to_string().as_str() {
            "CaUsedAsEndEntity" => "is a CA's, and not one of those in sslrootcert",
            "UnsupportedCertVersion" => "has a signer with a certificate of X.509 version 1 or 2",
            other => return other.to_owned(),
        },
        other => return format!("can't be verified: {other}"),
    };
    text.to_owned()
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.check != Check::Nothing {
            if !is_version_3(end_entity) {
                return Err(OldCertificate.into());
            }
            let parsed = ParsedCertificate::try_from(end_entity)?;
            self.signer(end_entity, &parsed, intermediates, now)?;
            if self.check == Check::SignerAndName {
                verify_server_name(&parsed, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.check == Check::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.check == Check::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
