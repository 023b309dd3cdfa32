package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Backdate is how long before its issue a certificate becomes valid, for verifiers
// whose clock is behind. Half-life is to be reckoned from NotBefore + Backdate.
const Backdate = 30 * time.Second

// authorityBackdate is longer, so that a leaf is never older than its authority.
const authorityBackdate = time.Minute

// maxCertificate bounds an authority's certificate; ours have about 500 bytes.
const maxCertificate = 4 << 10

// OriginOID is the private, non-critical extension with an Origin. Its arc is the
// enterprise number that RFC 5612 keeps for examples, which no other vendor will be
// given; a registered number of the project's own takes its place when there is one.
var OriginOID = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 17, 1}

// Origin says under which entry and through which agent an SVID was issued, each
// with its generation, so that a distrust item can be matched to a connection. An
// agent's own SVID has no entry.
type Origin struct {
	Entry           string
	EntryGeneration uint64 // revision of the entry's last change
	Agent           string
	AgentGeneration uint64 // revision at which the agent was attested
}

const originVersion = 1

type originASN1 struct {
	Version         int
	Entry           string `asn1:"utf8"`
	EntryGeneration int64
	Agent           string `asn1:"utf8"`
	AgentGeneration int64
}

func (o Origin) check() error {
	const maxName = 256
	switch {
	case len(o.Entry) > maxName || len(o.Agent) > maxName:
		return fmt.Errorf("origin names an entry or agent of over %d bytes", maxName)
	case !Revision(o.EntryGeneration).valid() || !Revision(o.AgentGeneration).valid():
		return errors.New("origin holds a generation that is no revision")
	}
	return nil
}

func (r Revision) valid() bool { return uint64(r)>>44 <= MaxEpoch }

// Extension encodes an origin.
func (o Origin) Extension() (pkix.Extension, error) {
	if err := o.check(); err != nil {
		return pkix.Extension{}, err
	}
	der, err := asn1.Marshal(originASN1{originVersion, o.Entry, int64(o.EntryGeneration), o.Agent, int64(o.AgentGeneration)})
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("encode origin: %w", err)
	}
	return pkix.Extension{Id: OriginOID, Value: der}, nil
}

// OriginOf reads the origin of a parsed certificate; ok is false if it has none. An
// origin that does not decode is an error: the certificate is not one of ours.
func OriginOf(cert *x509.Certificate) (o Origin, ok bool, err error) {
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(OriginOID) {
			o, err := ParseOrigin(ext.Value)
			return o, err == nil, err
		}
	}
	return Origin{}, false, nil
}

// ParseOrigin reads the value of the extension OriginOID.
func ParseOrigin(der []byte) (Origin, error) {
	if len(der) > 1<<10 {
		return Origin{}, fmt.Errorf("origin extension has %d bytes, over %d", len(der), 1<<10)
	}
	var v originASN1
	rest, err := asn1.Unmarshal(der, &v)
	switch {
	case err != nil:
		return Origin{}, fmt.Errorf("origin extension does not decode: %w", err)
	case len(rest) != 0:
		return Origin{}, errors.New("origin extension has trailing bytes")
	case v.Version != originVersion:
		return Origin{}, fmt.Errorf("origin extension has version %d, this release knows %d", v.Version, originVersion)
	case v.EntryGeneration < 0 || v.AgentGeneration < 0:
		return Origin{}, errors.New("origin extension holds a negative generation")
	}
	o := Origin{v.Entry, uint64(v.EntryGeneration), v.Agent, uint64(v.AgentGeneration)}
	return o, o.check()
}

// AuthorityRequest is what an authority's certificate is made from.
type AuthorityRequest struct {
	TrustDomain spiffeid.TrustDomain
	PublicKey   crypto.PublicKey
	Serial      [16]byte // random
	Now         time.Time
	Phase       time.Duration     // P; it lives 3P
	Upstream    *x509.Certificate // that will sign it, after LintUpstream; nil: it signs itself
}

// AuthorityTemplate is the certificate of a signing authority before it is signed
// (X509-SVID sections 3.2 and 4): CA, path length 0, exactly the trust domain's own
// ID, keyCertSign and cRLSign, critical.
func AuthorityTemplate(req AuthorityRequest) (*x509.Certificate, error) {
	if req.TrustDomain.IsZero() {
		return nil, errors.New("authority template: trust domain is missing")
	}
	if req.Phase <= 0 {
		return nil, errors.New("authority template: phase is not positive")
	}
	if err := checkIDLength(req.TrustDomain.ID()); err != nil {
		return nil, fmt.Errorf("authority template: %w", err)
	}
	keyID, err := subjectKeyID(req.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("authority template: %w", err)
	}
	serial, err := serialNumber(req.Serial)
	if err != nil {
		return nil, fmt.Errorf("authority template: %w", err)
	}
	now := req.Now.UTC().Truncate(time.Second)
	notBefore, notAfter := now.Add(-authorityBackdate), now.Add(3*req.Phase)
	var issuerKeyID []byte
	if up := req.Upstream; up != nil {
		if err := CheckUpstreamLife(up, req.Phase, now); err != nil {
			return nil, fmt.Errorf("authority template: %w", err)
		}
		issuerKeyID = up.SubjectKeyId
		if notBefore.Before(up.NotBefore) {
			notBefore = up.NotBefore
		}
		if notAfter.After(up.NotAfter) {
			notAfter = up.NotAfter
		}
	}
	return &x509.Certificate{
		SerialNumber: serial,
		// A name of its own for each, so that path building by name finds one.
		Subject:               pkix.Name{Organization: []string{"Entente"}, SerialNumber: serial.Text(16)},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		AuthorityKeyId:        issuerKeyID,
		URIs:                  []*url.URL{req.TrustDomain.ID().URL()},
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLen:            0,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId:          keyID,
		PublicKey:             req.PublicKey,
	}, nil
}

// LeafRequest is what an X.509-SVID is made from.
type LeafRequest struct {
	ID        spiffeid.ID
	DNSNames  []string
	PublicKey crypto.PublicKey
	Serial    [16]byte // random
	Now       time.Time
	Life      time.Duration     // cut to the authority's own end
	Authority *x509.Certificate // that will sign
	Origin    Origin            // zero: none is written
}

// LeafTemplate is an X.509-SVID before it is signed (X509-SVID sections 2 to 4): one
// URI SAN, no subject, digitalSignature, server and client authentication, not a CA.
// It refuses an ID outside the authority's trust domain.
func LeafTemplate(req LeafRequest) (*x509.Certificate, error) {
	fail := func(err error) (*x509.Certificate, error) {
		return nil, fmt.Errorf("SVID template for %s: %w", req.ID, err)
	}
	if req.ID.Path() == "" {
		return fail(errors.New("an SVID needs a SPIFFE ID with a path"))
	}
	if err := checkIDLength(req.ID); err != nil {
		return fail(err)
	}
	td, err := authorityDomain(req.Authority)
	if err != nil {
		return fail(err)
	}
	if !req.ID.MemberOf(td) {
		return fail(fmt.Errorf("the authority signs for %s only", td.Name()))
	}
	for _, name := range req.DNSNames {
		if !dnsName(name) {
			return fail(fmt.Errorf("%.80q is not a DNS name", name))
		}
	}
	if err := checkKey(req.PublicKey); err != nil {
		return fail(err)
	}
	serial, err := serialNumber(req.Serial)
	if err != nil {
		return fail(err)
	}
	if req.Life <= 0 {
		return fail(errors.New("life is not positive"))
	}
	now := req.Now.UTC().Truncate(time.Second)
	notBefore, notAfter := now.Add(-Backdate), now.Add(req.Life)
	if notBefore.Before(req.Authority.NotBefore) {
		notBefore = req.Authority.NotBefore
	}
	if notAfter.After(req.Authority.NotAfter) {
		notAfter = req.Authority.NotAfter
	}
	if !notAfter.After(now) || notBefore.After(now) {
		return fail(fmt.Errorf("the authority is valid from %s to %s only",
			req.Authority.NotBefore.UTC().Format(time.RFC3339), req.Authority.NotAfter.UTC().Format(time.RFC3339)))
	}
	leaf := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		URIs:                  []*url.URL{req.ID.URL()},
		DNSNames:              slices.Clone(req.DNSNames),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		AuthorityKeyId:        req.Authority.SubjectKeyId,
		PublicKey:             req.PublicKey,
	}
	if req.Origin != (Origin{}) {
		ext, err := req.Origin.Extension()
		if err != nil {
			return fail(err)
		}
		leaf.ExtraExtensions = []pkix.Extension{ext}
	}
	return leaf, nil
}

// LintAuthority refuses a certificate that is not exactly what AuthorityTemplate
// makes, for that trust domain and phase, signed by its upstream, or by its own key where
// that is nil. A CA node's door asks it before an authority is proposed, since Apply
// parses no X.509.
func LintAuthority(cert, upstream *x509.Certificate, td spiffeid.TrustDomain, phase time.Duration) error {
	var f findings
	f.common(cert)
	f.serial(cert, 128)
	id := f.uri(cert)
	f.refuse(!id.IsZero() && id != td.ID(), "its SPIFFE ID is %s, not %s", id, td.ID())
	f.refuse(!cert.BasicConstraintsValid || !cert.IsCA, "it is not a CA")
	f.refuse(cert.MaxPathLen != 0 || !cert.MaxPathLenZero, "its path length is not 0")
	f.refuse(cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign, "its key usage is not exactly keyCertSign and cRLSign")
	f.refuse(len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) != 0, "it has an extended key usage")
	f.refuse(len(cert.DNSNames) != 0, "it has DNS names")
	f.refuse(len(cert.SubjectKeyId) == 0, "it has no subject key id")
	f.refuse(cert.NotAfter.Sub(cert.NotBefore) > 3*phase+authorityBackdate, "it lives %v, over three phases of %v", cert.NotAfter.Sub(cert.NotBefore), phase)
	if upstream != nil {
		f.issuer(cert, upstream)
		return f.err("authority certificate")
	}
	f.refuse(!bytes.Equal(cert.RawSubject, cert.RawIssuer), "its issuer is not itself")
	if err := cert.CheckSignatureFrom(cert); err != nil {
		f.refuse(true, "it is not signed by its own key: %v", err)
	}
	return f.err("authority certificate")
}

// LintLeaf refuses an X.509-SVID that is not exactly what LeafTemplate makes for that
// authority. It does not verify the signature.
func LintLeaf(cert, authority *x509.Certificate) error {
	var f findings
	td, err := authorityDomain(authority)
	if err != nil {
		return err
	}
	f.common(cert)
	f.serial(cert, 128)
	id := f.uri(cert)
	f.refuse(!id.IsZero() && !id.MemberOf(td), "its SPIFFE ID %s is outside %s", id, td.Name())
	f.refuse(!id.IsZero() && id.Path() == "", "its SPIFFE ID has no path")
	f.refuse(!cert.BasicConstraintsValid || cert.IsCA, "it does not say that it is no CA")
	f.refuse(cert.KeyUsage != x509.KeyUsageDigitalSignature, "its key usage is not exactly digitalSignature")
	f.refuse(len(cert.UnknownExtKeyUsage) != 0 || !slices.Equal(slices.Sorted(slices.Values(cert.ExtKeyUsage)),
		[]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}), "its extended key usage is not server and client authentication")
	f.refuse(cert.NotBefore.Before(authority.NotBefore) || cert.NotAfter.After(authority.NotAfter), "it is valid outside its authority's life")
	f.refuse(!bytes.Equal(cert.RawIssuer, authority.RawSubject), "its issuer is not the authority")
	for _, name := range cert.DNSNames {
		f.refuse(!dnsName(name), "%.80q is not a DNS name", name)
	}
	if _, _, err := OriginOf(cert); err != nil {
		f.refuse(true, "%v", err)
	}
	return f.err("X.509-SVID")
}

// NewAuthority takes a member's X.509 authority certificate apart into the record that
// PrepareAuthority proposes, after LintAuthority and at the time now. upstream is the root
// that signed it, after LintUpstream; none: it signed itself.
func NewAuthority(td spiffeid.TrustDomain, memberID string, der, upstream []byte, phase time.Duration, now time.Time) (*statev1.Authority, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("authority certificate has %d bytes, over %d", len(der), maxCertificate)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("authority certificate does not parse: %w", err)
	}
	record := &statev1.Authority{
		Id:          KeyID(cert.RawSubjectPublicKeyInfo),
		MemberId:    memberID,
		Use:         statev1.KeyUse_KEY_USE_X509,
		PublicKey:   bytes.Clone(cert.RawSubjectPublicKeyInfo),
		Certificate: bytes.Clone(cert.Raw),
		NotBefore:   cert.NotBefore.Unix(),
		NotAfter:    cert.NotAfter.Unix(),
		Phase:       statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED,
	}
	var root *x509.Certificate
	if len(upstream) > 0 {
		if root, err = ParseUpstream(upstream, td); err != nil {
			return nil, err
		}
		record.Upstream, record.UpstreamNotAfter = bytes.Clone(root.Raw), root.NotAfter.Unix()
	}
	if err := LintAuthority(cert, root, td, phase); err != nil {
		return nil, err
	}
	if now.Before(cert.NotBefore) || !now.Before(cert.NotAfter) {
		return nil, errors.New("authority certificate is not valid now: compare the clocks of the CA nodes")
	}
	return record, nil
}

// authorityDomain is the trust domain that a signing certificate speaks for.
func authorityDomain(authority *x509.Certificate) (spiffeid.TrustDomain, error) {
	if authority == nil || !authority.IsCA || len(authority.URIs) != 1 {
		return spiffeid.TrustDomain{}, errors.New("the signing certificate is not an authority of a trust domain")
	}
	id, err := spiffeid.FromURI(authority.URIs[0])
	if err != nil || id.Path() != "" {
		return spiffeid.TrustDomain{}, errors.New("the signing certificate does not name a trust domain")
	}
	return id.TrustDomain(), nil
}

// findings collects what is wrong with a certificate.
type findings []error

func (f *findings) refuse(wrong bool, format string, args ...any) {
	if wrong {
		*f = append(*f, fmt.Errorf(format, args...))
	}
}

func (f findings) err(what string) error {
	if len(f) == 0 {
		return nil
	}
	return fmt.Errorf("%s refused: %w", what, errors.Join(f...))
}

var (
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidNameConstraints  = asn1.ObjectIdentifier{2, 5, 29, 30}
)

// serial refuses numbers that we do not make, or that nobody may.
func (f *findings) serial(cert *x509.Certificate, bits int) {
	n := cert.SerialNumber
	f.refuse(n == nil || n.Sign() <= 0 || n.BitLen() > bits, "its serial number is not positive with at most %d bits", bits)
}

// common is what all profiles ask.
func (f *findings) common(cert *x509.Certificate) {
	f.refuse(cert.Version != 3, "it is not an X.509 v3 certificate")
	f.refuse(!cert.NotAfter.After(cert.NotBefore), "it ends before it begins")
	f.refuse(len(cert.EmailAddresses)+len(cert.IPAddresses) != 0, "it has e-mail or IP names")
	f.refuse(len(cert.UnhandledCriticalExtensions) != 0, "it has a critical extension that nobody knows")
	if err := checkKey(cert.PublicKey); err != nil {
		f.refuse(true, "%v", err)
	}
	critical := false
	for _, ext := range cert.Extensions {
		critical = critical || ext.Critical && ext.Id.Equal(oidKeyUsage)
		f.refuse(ext.Critical && !ext.Id.Equal(oidKeyUsage) && !ext.Id.Equal(oidBasicConstraints) && !ext.Id.Equal(oidSubjectAltName),
			"its extension %s is critical", ext.Id)
		// rustls refuses every chain that carries one for URIs.
		f.refuse(ext.Id.Equal(oidNameConstraints), "it has name constraints")
	}
	f.refuse(!critical, "its key usage is missing or not critical")
}

// uri returns the one SPIFFE ID of a certificate, zero with findings if it has none.
// It looks at the encoded name as well: net/url drops an empty fragment.
func (f *findings) uri(cert *x509.Certificate) spiffeid.ID {
	raw, err := uriNames(cert)
	if err != nil {
		f.refuse(true, "%v", err)
		return spiffeid.ID{}
	}
	if len(raw) != 1 || len(cert.URIs) != 1 {
		f.refuse(true, "it has %d URI names, not one", len(raw))
		return spiffeid.ID{}
	}
	if strings.ContainsAny(raw[0], "#?%") {
		f.refuse(true, "its URI name %.80q is not a plain SPIFFE ID", raw[0])
		return spiffeid.ID{}
	}
	id, err := spiffeid.FromString(raw[0])
	if err == nil {
		err = checkIDLength(id)
	}
	if err != nil {
		f.refuse(true, "its URI name is not a SPIFFE ID: %v", err)
		return spiffeid.ID{}
	}
	return id
}

// uriNames are the uniformResourceIdentifier names (RFC 5280 section 4.2.1.6) as
// they stand in the certificate.
func uriNames(cert *x509.Certificate) ([]string, error) {
	var uris []string
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) != 0 {
			return nil, errors.New("its subject alternative name does not decode")
		}
		for _, name := range names {
			if name.Class == asn1.ClassContextSpecific && name.Tag == 6 {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	return uris, nil
}

// checkKey says which keys are certified.
func checkKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return errors.New("its ECDSA key is not on P-256 or P-384")
		}
		return nil
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("its RSA key has %d bits, not 2048 to 4096", n)
		}
		return nil
	}
	return fmt.Errorf("its key type %T is not one of ECDSA, Ed25519, RSA", key)
}

func serialNumber(random [16]byte) (*big.Int, error) {
	n := new(big.Int).SetBytes(random[:])
	if n.BitLen() < 64 {
		return nil, errors.New("serial number is not random")
	}
	return n, nil
}

// subjectKeyID follows RFC 7093 section 2 method 4: a hash of the whole
// SubjectPublicKeyInfo, cut to 160 bits.
func subjectKeyID(key crypto.PublicKey) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(spki)
	return sum[:20], nil
}
