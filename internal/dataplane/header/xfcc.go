package header

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ClientCertElement is the one element of X-Forwarded-Client-Cert that a callee's
// sidecar writes for its application (Envoy's form of the header).
type ClientCertElement struct {
	By   spiffeid.ID // who was called
	Hash string      // hex SHA-256 of the certificate of the TLS peer, which may be a gateway's
	URI  spiffeid.ID // the original caller
}

// Hash is ClientCertElement.Hash of a certificate.
func Hash(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// String needs no quoting: a SPIFFE ID has no ";", "," or "=".
func (e ClientCertElement) String() string {
	return "By=" + e.By.String() + ";Hash=" + e.Hash + ";URI=" + e.URI.String()
}

var errClientCert = errors.New(ClientCert + `: one element "By=ID;Hash=64 hex digits;URI=ID" is expected`)

// ParseClientCert reads what String writes, and nothing wider: an application
// behind our sidecar never sees more than that one element.
func ParseClientCert(value string) (ClientCertElement, error) {
	by, rest, ok := strings.Cut(value, ";")
	hash, uri, ok2 := strings.Cut(rest, ";")
	by, ok3 := strings.CutPrefix(by, "By=")
	hash, ok4 := strings.CutPrefix(hash, "Hash=")
	uri, ok5 := strings.CutPrefix(uri, "URI=")
	if !ok || !ok2 || !ok3 || !ok4 || !ok5 || len(hash) != 2*sha256.Size || strings.Trim(hash, "0123456789abcdef") != "" {
		return ClientCertElement{}, errClientCert
	}
	byID, err := spiffeid.FromString(by)
	if err != nil {
		return ClientCertElement{}, errClientCert
	}
	uriID, err := spiffeid.FromString(uri)
	if err != nil {
		return ClientCertElement{}, errClientCert
	}
	return ClientCertElement{By: byID, Hash: hash, URI: uriID}, nil
}
