package peer

import (
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Sizes of SPIFFE-ID 2.3, and the longest chain we look at. A SPIFFE chain is a leaf and one or two intermediates.
const (
	maxID          = 2048
	maxTrustDomain = 255
	maxChain       = 8
)

var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage       = asn1.ObjectIdentifier{2, 5, 29, 15}
)

// Verify verifies an X509-SVID, given with its intermediates, leaf first, at the time now, and returns its SPIFFE ID.
//
// It is stricter than x509svid.Verify, which lets issuer mistakes pass that are dangerous in a peer. The leaf must have
// exactly one URI SAN, whose bytes are a SPIFFE ID with a path; a critical key usage with digitalSignature and without
// keyCertSign and cRLSign; both serverAuth and clientAuth if it has an extended key usage; and must not be a CA. It must
// chain to an authority in the bundle of its own trust domain. A signing certificate on the way must have keyCertSign, and if
// it carries a SPIFFE ID, this must be of the same trust domain and have no path. (X509-SVID 2 to 5, Federation 7.3.)
//
// Name constraints are checked by crypto/x509 but never relied on: there a constraint to "bank.example" also permits
// "sub.bank.example".
//
// When the ID could be read, it is returned beside the error, for logs only.
func Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	id, _, err := verify(chain, bundles, now)
	return id, err
}

// verify is Verify that also returns the chain found, leaf first, authority last.
func verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, []*x509.Certificate, error) {
	switch {
	case len(chain) == 0:
		return spiffeid.ID{}, nil, errors.New("peer showed no certificate")
	case len(chain) > maxChain:
		return spiffeid.ID{}, nil, fmt.Errorf("peer showed %d certificates: more than %d are not looked at", len(chain), maxChain)
	case bundles == nil:
		return spiffeid.ID{}, nil, errors.New("no trust bundles to verify the peer with")
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("peer certificate is not an X509-SVID: %w", err)
	}
	if err := checkLeaf(leaf); err != nil {
		return id, nil, fmt.Errorf("certificate of %s is not an X509-SVID: %w", id, err)
	}
	bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return id, nil, fmt.Errorf("no trust in %s: no bundle of trust domain %s: %w", id, id.TrustDomain(), err)
	}
	if bundle == nil {
		return id, nil, fmt.Errorf("no trust in %s: no bundle of trust domain %s", id, id.TrustDomain())
	}
	// A source that answers with another domain's bundle would pool the two.
	if bundle.TrustDomain() != id.TrustDomain() {
		return id, nil, fmt.Errorf("no trust in %s: the bundle given for it is that of %s", id, bundle.TrustDomain())
	}

	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, authority := range bundle.X509Authorities() {
		roots.AddCert(authority)
	}
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	found, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // checkLeaf and checkSigner look at both uses
	})
	if err != nil {
		return id, nil, fmt.Errorf("certificate of %s is not signed by its trust domain: %w", id, err)
	}
	for _, path := range found {
		if err = checkSigners(path[1:], id.TrustDomain()); err != nil {
			continue
		}
		if err := distrusted(bundles, path); err != nil {
			return id, nil, fmt.Errorf("certificate of %s is distrusted: %w", id, err)
		}
		return id, path, nil
	}
	return id, nil, fmt.Errorf("certificate of %s is not properly signed: %w", id, err)
}

// Distruster is what a source of bundles may be as well: it knows of SVIDs that are not to be accepted although its bundle
// verifies them, for the agent, the entry or the authority behind them is gone. path is how the SVID verified, leaf first,
// authority last. It is asked at each handshake and each recheck.
type Distruster interface {
	Distrusted(path []*x509.Certificate) error
}

func distrusted(bundles x509bundle.Source, path []*x509.Certificate) error {
	if d, ok := bundles.(Distruster); ok {
		return d.Distrusted(path)
	}
	return nil
}

// Announcer is what a Distruster may be as well: it knows of SVIDs that it will distrust within a second. Announced returns
// nil when there are none, else what says of a certificate chain, leaf first, that it is one of them. Connections that rest
// on such an SVID are to be replaced before they are cut.
type Announcer interface {
	Announced() (check func(chain []*x509.Certificate) error)
}

// Announced is that of bundles; nil if they announce nothing.
func Announced(bundles x509bundle.Source) (check func(chain []*x509.Certificate) error) {
	if a, ok := bundles.(Announcer); ok {
		return a.Announced()
	}
	return nil
}

// KeyID names a public key: the lower-case hexadecimal SHA-256 of its DER SubjectPublicKeyInfo.
func KeyID(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// leafID reads the SPIFFE ID from the bytes of the certificate. Through net/url, "spiffe://td/a#" and "SPIFFE://td/a" would
// pass for "spiffe://td/a".
func leafID(leaf *x509.Certificate) (spiffeid.ID, error) {
	uris, err := rawURIs(leaf)
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case len(uris) != 1:
		return spiffeid.ID{}, fmt.Errorf("it has %d URI names, not one", len(uris))
	case len(uris[0]) > maxID:
		return spiffeid.ID{}, fmt.Errorf("its SPIFFE ID is longer than %d bytes", maxID)
	}
	id, err := spiffeid.FromString(uris[0])
	switch {
	case err != nil:
		return spiffeid.ID{}, fmt.Errorf("URI name %q: %w", uris[0], err)
	case len(id.TrustDomain().Name()) > maxTrustDomain:
		return spiffeid.ID{}, fmt.Errorf("its trust domain name is longer than %d bytes", maxTrustDomain)
	case id.Path() == "":
		return spiffeid.ID{}, fmt.Errorf("%s has no path: it names a trust domain, not a workload", id)
	}
	return id, nil
}

// rawURIs returns the URI names of the subject alternative name extension as they stand there (RFC 5280 4.2.1.6).
func rawURIs(cert *x509.Certificate) ([]string, error) {
	const tagURI = 6
	var uris []string
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names asn1.RawValue
		rest, err := asn1.Unmarshal(ext.Value, &names)
		if err != nil || len(rest) > 0 || names.Class != asn1.ClassUniversal || names.Tag != asn1.TagSequence {
			return nil, errors.New("malformed subject alternative names")
		}
		for rest = names.Bytes; len(rest) > 0; {
			var name asn1.RawValue
			if rest, err = asn1.Unmarshal(rest, &name); err != nil {
				return nil, errors.New("malformed subject alternative names")
			}
			if name.Class == asn1.ClassContextSpecific && name.Tag == tagURI {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	return uris, nil
}

func checkLeaf(leaf *x509.Certificate) error {
	critical := slices.ContainsFunc(leaf.Extensions, func(ext pkix.Extension) bool {
		return ext.Id.Equal(oidKeyUsage) && ext.Critical
	})
	switch {
	case leaf.IsCA:
		return errors.New("it is a signing certificate (CA)")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("its key may sign certificates or revocation lists")
	case !critical:
		return errors.New("it has no critical key usage")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("its key usage lacks digitalSignature")
	case hasExtKeyUsage(leaf) && !bothUses(leaf):
		return errors.New("its extended key usage lacks serverAuth or clientAuth")
	}
	return nil
}

// checkSigners looks at what crypto/x509 does not in the certificates above the leaf: intermediates and authority.
func checkSigners(signers []*x509.Certificate, td spiffeid.TrustDomain) error {
	for i, signer := range signers {
		if err := checkSignerName(signer, td); err != nil {
			return err
		}
		if i == len(signers)-1 {
			break // the bundle says what an authority may do
		}
		switch {
		case signer.KeyUsage&x509.KeyUsageCertSign == 0:
			return errors.New("an intermediate's key usage lacks keyCertSign")
		case hasExtKeyUsage(signer) && !bothUses(signer) && !slices.Contains(signer.ExtKeyUsage, x509.ExtKeyUsageAny):
			return errors.New("an intermediate's extended key usage lacks serverAuth or clientAuth")
		}
	}
	return nil
}

func checkSignerName(signer *x509.Certificate, td spiffeid.TrustDomain) error {
	uris, err := rawURIs(signer)
	if err != nil {
		return fmt.Errorf("a signing certificate: %w", err)
	}
	for _, uri := range uris {
		u, err := url.Parse(uri)
		if err == nil && !strings.EqualFold(u.Scheme, "spiffe") {
			continue // an ordinary PKI's certificate may have such names
		}
		if uri != td.IDString() {
			return fmt.Errorf("it is signed by %q, which is not the authority of %s", uri, td)
		}
	}
	return nil
}

func hasExtKeyUsage(cert *x509.Certificate) bool {
	return len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0
}

func bothUses(cert *x509.Certificate) bool {
	return slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
}
