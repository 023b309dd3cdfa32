package ca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An upstream is a root that certifies the X.509 authorities of one trust domain: each
// is an intermediate of it, and the root stands in the bundle in their place.

// ParseUpstream reads a root's certificate, DER, and lints it.
func ParseUpstream(der []byte, td spiffeid.TrustDomain) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("upstream certificate has %d bytes, over %d", len(der), maxCertificate)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("upstream certificate does not parse: %w", err)
	}
	return root, LintUpstream(root, td)
}

// LintUpstream refuses a root that may not certify authorities of that trust domain, or
// under which verifiers would accept more or less than they should.
func LintUpstream(root *x509.Certificate, td spiffeid.TrustDomain) error {
	var f findings
	f.common(root)
	f.serial(root, 160) // RFC 5280 section 4.1.2.2
	f.refuse(!root.BasicConstraintsValid || !root.IsCA, "it is not a CA")
	// MaxPathLen is -1 where there is none.
	f.refuse(root.MaxPathLen == 0, "its path length is 0, which forbids the intermediates that CA nodes are: make a root without one, or with 1")
	f.refuse(root.KeyUsage&x509.KeyUsageCertSign == 0, "its key usage lacks keyCertSign")
	f.refuse(len(root.ExtKeyUsage)+len(root.UnknownExtKeyUsage) != 0, "it has an extended key usage")
	f.refuse(len(root.SubjectKeyId) == 0, "it has no subject key id")
	f.refuse(len(root.Subject.ToRDNSequence()) == 0, "it has no subject to be named by")
	// It may have no name of SPIFFE's, since roots of an ordinary PKI have none; a name
	// says whose it is.
	if raw, err := uriNames(root); err != nil {
		f.refuse(true, "%v", err)
	} else if len(raw) > 0 {
		id := f.uri(root)
		f.refuse(!id.IsZero() && id != td.ID(), "it is the root of %s, not of %s", id, td.ID())
	}
	if !bytes.Equal(root.RawSubject, root.RawIssuer) {
		f.refuse(true, "it is not a root: its issuer is another, and would stand in no bundle")
	} else if err := root.CheckSignatureFrom(root); err != nil {
		f.refuse(true, "it is not signed by its own key: %v", err)
	}
	return f.err("upstream certificate")
}

// ErrUpstreamEnds: the root ends before an authority under it could do its work.
var ErrUpstreamEnds = errors.New("the upstream ends too soon")

// UpstreamWarning is how long before a root certifies nothing any more people are told,
// in phases.
const UpstreamWarning = 6

// UpstreamCertifiesUntil is when a root's last authority may be made.
func UpstreamCertifiesUntil(root *x509.Certificate, phase time.Duration) time.Time {
	return root.NotAfter.Add(-2 * phase)
}

// CheckUpstreamLife refuses a root under which an authority that is made now could not
// sign leaves of full length when its turn comes: that is in a phase, and a leaf lives
// for a phase at most. Authorities never outlive their root.
func CheckUpstreamLife(root *x509.Certificate, phase time.Duration, now time.Time) error {
	switch {
	case now.Before(root.NotBefore):
		return fmt.Errorf("the upstream is valid from %s on: compare the clocks", root.NotBefore.UTC().Format(time.RFC3339))
	case UpstreamCertifiesUntil(root, phase).Before(now):
		return fmt.Errorf("%w: at %s, and an authority made now needs it for two phases of %v: put a new root in its place (see docs/how-to/certify-by-a-root.md)",
			ErrUpstreamEnds, root.NotAfter.UTC().Format(time.RFC3339), phase)
	}
	return nil
}

// issuer refuses an authority certificate that its root did not sign, or that
// outlives it.
func (f *findings) issuer(cert, root *x509.Certificate) {
	f.refuse(!bytes.Equal(cert.RawIssuer, root.RawSubject), "its issuer is not its upstream")
	f.refuse(bytes.Equal(cert.RawSubject, root.RawSubject), "it has the name of its upstream")
	f.refuse(!bytes.Equal(cert.AuthorityKeyId, root.SubjectKeyId), "its authority key id is not its upstream's")
	f.refuse(bytes.Equal(cert.RawSubjectPublicKeyInfo, root.RawSubjectPublicKeyInfo), "it has its upstream's key")
	f.refuse(cert.NotBefore.Before(root.NotBefore) || cert.NotAfter.After(root.NotAfter), "it is valid outside its upstream's life")
	if err := cert.CheckSignatureFrom(root); err != nil {
		f.refuse(true, "it is not signed by its upstream: %v", err)
	}
}
