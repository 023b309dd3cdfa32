package nodeattest

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"text/template"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/pemfile"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Bounds of what a host sends and of what the operator gives.
const (
	maxChain       = 6
	maxCertificate = 8 << 10
	maxBundle      = 1 << 20
	maxAnchors     = 256
	maxRendered    = 256
	maxAddresses   = 16
)

// X509PoPConfig says which certificates admit hosts, and as what.
type X509PoPConfig struct {
	// Anchors are the authorities that sign the hosts' certificates, as they are now: see
	// ParseAnchors.
	Anchors func() (*x509.CertPool, error)
	// Zone is the DNS zone that the hosts' names are in, as in dc1.example. No other host
	// is admitted, and label is what stands before it.
	Zone string
	// Name is the agent's name, one DNS label: a text/template over Certificate. Empty:
	// {{label .Host}}. There label is a name of the zone without the zone, with -- for
	// each dot: different names give different labels, and names outside the zone none.
	Name string
	// Datacenter is a name or a template as well. There label is the first DNS label.
	Datacenter string
	// PathPrefixes are the scope of the agents; none: everything.
	PathPrefixes []string
}

// X509PoPSection is x509pop in a CA node's file: hosts are admitted by certificates that
// another PKI gave them. It must be the same at every CA node: each decides by its own file.
type X509PoPSection struct {
	yamlfile.Pos

	// CABundle is a PEM file with the authorities of the hosts' certificates. It is read
	// again when it changes. Empty: no host is admitted by a certificate.
	CABundle string `yaml:"caBundle"`
	// Zone is the DNS zone of the hosts' names, as in dc1.example: the first DNS name of a
	// certificate, else its common name, must be in it.
	Zone string `yaml:"zone"`
	// Name of the agent, one DNS label: a template over the certificate. Default
	// {{label .Host}}: that name without the zone, with -- for each dot.
	Name string `yaml:"name"`
	// Datacenter of the agent: a name, or a template as in {{label .Locality}}.
	Datacenter string `yaml:"datacenter"`
	// PathPrefixes are the SPIFFE paths at or below which these hosts may hold entries.
	// Default: all.
	PathPrefixes []string `yaml:"pathPrefixes"`
}

// openX509PoP returns nil where no host is admitted by a certificate.
func openX509PoP(s *Sections, files *daemon.Files) (verify, error) {
	c := &s.X509PoP
	if c.CABundle == "" {
		if c.Zone != "" || c.Name != "" || c.Datacenter != "" || len(c.PathPrefixes) > 0 {
			return nil, errors.New("caBundle is missing: without it no certificate admits a host")
		}
		return nil, nil
	}
	anchors, err := daemon.Follow(files, "x509pop.caBundle", func(contents [][]byte) (*x509.CertPool, error) {
		return ParseAnchors(contents[0])
	}, c.CABundle)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.CABundle, err)
	}
	x, err := NewX509PoP(X509PoPConfig{Anchors: anchors.Get, Zone: c.Zone, Name: c.Name, Datacenter: c.Datacenter, PathPrefixes: c.PathPrefixes})
	if err != nil {
		return nil, err
	}
	return x.admit, nil
}

// certificateOf names the certificate in a request.
func certificateOf(req *ententev1.AttestRequest) string {
	if len(req.GetCertificates()) == 0 {
		return ""
	}
	return "certificate/" + Fingerprint(req.GetCertificates()[0])
}

// admit verifies the certificate, and that the host holds its key.
func (x *X509PoP) admit(req *ententev1.AttestRequest, bound Bound, now time.Time) (*statev1.Agent, error) {
	leaf, host, err := x.Verify(req.GetCertificates(), now)
	if err != nil {
		return nil, err
	}
	statement, err := ca.VerifyPossession(leaf.PublicKey, req.GetStatement(), req.GetSignature())
	if err != nil {
		return nil, err
	}
	return host, ca.CheckPossession(statement, bound.TrustDomain, bound.KeyID, host.GetCertificate(), bound.Exporter)
}

// Certificate is what templates can speak of.
type Certificate struct {
	Host               string // the first DNS name, else the common name
	CommonName         string
	DNSNames           []string
	Organization       string // the first
	OrganizationalUnit string // the first
	Locality           string // the first
	SerialNumber       string // lower-case hex
	Fingerprint        string // SHA-256 of the certificate, lower-case hex
}

const defaultName = "{{label .Host}}"

// X509PoP admits hosts by certificates. Its methods may be called concurrently.
type X509PoP struct {
	config           X509PoPConfig
	name, datacenter *template.Template
}

// NewX509PoP checks the configuration.
func NewX509PoP(config X509PoPConfig) (*X509PoP, error) {
	if config.Zone = strings.ToLower(strings.Trim(config.Zone, ".")); config.Zone == "" {
		return nil, errors.New("zone is missing: the DNS zone of the hosts' names, as in dc1.example, without which hosts of two zones would be one agent")
	}
	if err := ca.CheckHost(config.Zone); err != nil {
		return nil, fmt.Errorf("zone: %w", err)
	}
	x := &X509PoP{config: config}
	if config.Name == "" {
		config.Name = defaultName
	}
	var err error
	if x.name, err = parseTemplate("name", config.Name, config.Zone, x.label); err != nil {
		return nil, err
	}
	if x.datacenter, err = parseTemplate("datacenter", config.Datacenter, config.Zone, firstLabel); err != nil {
		return nil, err
	}
	if config.Datacenter == "" {
		return nil, errors.New("datacenter is missing: a name, or a template as in {{label .Locality}}")
	}
	if err := ca.CheckScope(config.PathPrefixes); err != nil {
		return nil, err
	}
	if _, err := config.Anchors(); err != nil {
		return nil, err
	}
	return x, nil
}

// parseTemplate also tries it: a field that does not exist is noticed now.
func parseTemplate(what, text, zone string, label any) (*template.Template, error) {
	t, err := template.New(what).Option("missingkey=error").Funcs(template.FuncMap{"label": label, "lower": strings.ToLower}).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	host := "h1." + zone
	if _, err := render(t, Certificate{Host: host, CommonName: host, DNSNames: []string{host}}); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return t, nil
}

// firstLabel is the first label of a name, in lower case: dc1 of DC1.example.
func firstLabel(name string) string {
	first, _, _ := strings.Cut(name, ".")
	return strings.ToLower(first)
}

// label is a name without the zone as one label, in lower case: h1 of H1.dc1.example in
// zone dc1.example, h1--dc1 of the same in zone example. A name that has -- itself, or is
// not in the zone, has none: no two names have the same.
func (x *X509PoP) label(name string) (string, error) {
	within, in := strings.CutSuffix(strings.ToLower(name), "."+x.config.Zone)
	switch {
	case !in || within == "":
		return "", fmt.Errorf("%.100q is not a name in zone %s", name, x.config.Zone)
	case strings.Contains(within, "--"):
		return "", fmt.Errorf("%.100q has -- in it, which stands for a dot in an agent's name", name)
	}
	labels := strings.Split(within, ".")
	for _, one := range labels {
		if err := ca.CheckLabel(one); err != nil {
			return "", fmt.Errorf("%.100q: %w", name, err)
		}
	}
	return strings.Join(labels, "--"), nil
}

func render(t *template.Template, c Certificate) (string, error) {
	var b limited
	if err := t.Execute(&b, c); err != nil {
		return "", err
	}
	return string(b), nil
}

// limited is a writer that refuses to grow without end.
type limited []byte

func (l *limited) Write(b []byte) (int, error) {
	if len(*l)+len(b) > maxRendered {
		return 0, fmt.Errorf("the result has over %d bytes", maxRendered)
	}
	*l = append(*l, b...)
	return len(b), nil
}

// ParseAnchors reads the authorities of hosts' certificates, PEM: all of them or, if one line
// is damaged, none.
func ParseAnchors(text []byte) (*x509.CertPool, error) {
	if len(text) > maxBundle {
		return nil, fmt.Errorf("%d bytes, over %d", len(text), maxBundle)
	}
	list, err := pemfile.Certificates(text, maxAnchors)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	for i, cert := range list {
		if !cert.IsCA || !cert.BasicConstraintsValid {
			return nil, fmt.Errorf("certificate %d (%s) is no authority's", i+1, cert.Subject)
		}
		roots.AddCert(cert)
	}
	return roots, nil
}

// Verify says what a chain (DER, leaf first) makes of the host that holds the leaf's key:
// an agent without its own key. It verifies with the configured authorities only, for
// client authentication, at now.
func (x *X509PoP) Verify(chain [][]byte, now time.Time) (leaf *x509.Certificate, host *statev1.Agent, err error) {
	leaf, intermediates, err := parseChain(chain)
	if err != nil {
		return nil, nil, err
	}
	if err := checkLeaf(leaf); err != nil {
		return nil, nil, fmt.Errorf("the host's certificate: %w", err)
	}
	roots, err := x.config.Anchors()
	if err != nil {
		return nil, nil, err
	}
	paths, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("the host's certificate does not verify: %w", err)
	}
	host, err = x.describe(leaf, paths)
	return leaf, host, err
}

func parseChain(chain [][]byte) (leaf *x509.Certificate, intermediates *x509.CertPool, err error) {
	if n := len(chain); n == 0 || n > maxChain {
		return nil, nil, fmt.Errorf("the host shows %d certificates, not 1 to %d", n, maxChain)
	}
	intermediates = x509.NewCertPool()
	for i, der := range chain {
		if len(der) > maxCertificate {
			return nil, nil, fmt.Errorf("certificate %d of the host has %d bytes, over %d", i+1, len(der), maxCertificate)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %d of the host does not parse: %w", i+1, err)
		}
		if i == 0 {
			leaf = cert
		} else {
			intermediates.AddCert(cert)
		}
	}
	return leaf, intermediates, nil
}

// checkLeaf asks for what chain verification leaves open: a certificate that is silent
// about its use could be used for anything.
func checkLeaf(leaf *x509.Certificate) error {
	switch {
	case leaf.IsCA:
		return errors.New("it is an authority's, not a host's")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("its key usage does not include digitalSignature")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("its key may sign certificates")
	case !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return errors.New("its extended key usage does not include clientAuth")
	}
	return ca.CheckPossessionKey(leaf.PublicKey)
}

// describe makes an agent of a certificate that verifies.
func (x *X509PoP) describe(leaf *x509.Certificate, paths [][]*x509.Certificate) (*statev1.Agent, error) {
	c := Certificate{
		CommonName: leaf.Subject.CommonName, DNSNames: leaf.DNSNames, Host: leaf.Subject.CommonName,
		Organization: first(leaf.Subject.Organization), OrganizationalUnit: first(leaf.Subject.OrganizationalUnit), Locality: first(leaf.Subject.Locality),
		SerialNumber: leaf.SerialNumber.Text(16), Fingerprint: Fingerprint(leaf.Raw),
	}
	if len(leaf.DNSNames) > 0 {
		c.Host = leaf.DNSNames[0]
	}
	if name := strings.ToLower(c.Host); !strings.HasSuffix(name, "."+x.config.Zone) {
		return nil, fmt.Errorf("the host's certificate gives no name of an agent: it is for %.100q, which is not in zone %s (x509pop.zone)", c.Host, x.config.Zone)
	}
	host := &statev1.Agent{Certificate: c.Fingerprint, PathPrefixes: x.config.PathPrefixes}
	for _, part := range []struct {
		what string
		t    *template.Template
		into *string
	}{{"name", x.name, &host.Name}, {"datacenter", x.datacenter, &host.Datacenter}} {
		text, err := render(part.t, c)
		if err == nil {
			err = ca.CheckLabel(text)
		}
		if err != nil {
			return nil, fmt.Errorf("the host's certificate gives no %s of an agent: %w", part.what, err)
		}
		*part.into = text
	}
	for _, name := range leaf.DNSNames {
		if name = strings.ToLower(name); ca.CheckHost(name) == nil && len(host.Addresses) < maxAddresses {
			host.Addresses = append(host.Addresses, name)
		}
	}
	for _, ip := range leaf.IPAddresses {
		if !unreachable(ip) && len(host.Addresses) < maxAddresses {
			host.Addresses = append(host.Addresses, ip.String())
		}
	}
	host.Selectors = selectorsOf(leaf, c, paths)
	return host, nil
}

// unreachable are addresses at which nobody else can reach the host.
func unreachable(ip net.IP) bool { return ip.IsUnspecified() || ip.IsMulticast() }

// selectorsOf are what entries may demand, in the spelling of SPIRE's x509pop where it has
// one; fingerprints are SHA-256. What does not fit is left out.
func selectorsOf(leaf *x509.Certificate, c Certificate, paths [][]*x509.Certificate) []string {
	var all []string
	add := func(kind, value string) {
		if s := selector.X509PoP + ":" + kind + ":" + value; value != "" && selector.CheckNode([]string{s}) == nil {
			all = append(all, s)
		}
	}
	add("subject:cn", c.CommonName)
	add("subject:o", c.Organization)
	add("subject:ou", c.OrganizationalUnit)
	add("serialnumber", c.SerialNumber)
	add("fingerprint", c.Fingerprint)
	for _, name := range leaf.DNSNames {
		add("san:dns", strings.ToLower(name))
	}
	for _, uri := range leaf.URIs {
		add("san:uri", uri.String())
	}
	for _, path := range paths {
		for _, authority := range path[1:] {
			add("ca:fingerprint", Fingerprint(authority.Raw))
		}
	}
	slices.Sort(all)
	all = slices.Compact(all)
	return all[:min(len(all), selector.MaxNodeCount)]
}

func first(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return list[0]
}

// Fingerprint names a certificate: hex SHA-256 of its DER.
func Fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}
