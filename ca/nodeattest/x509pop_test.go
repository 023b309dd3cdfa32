package nodeattest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

// pki is an authority for hosts.
type pki struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newPKI(t testing.TB, name string) *pki {
	p := &pki{t: t, key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	p.cert = p.sign(template, template, &p.key.PublicKey, p.key)
	return p
}

func (p *pki) sign(template, parent *x509.Certificate, public any, key *ecdsa.PrivateKey) *x509.Certificate {
	p.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		p.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return cert
}

// host issues a host's certificate, as edit alters it.
func (p *pki) host(edit func(*x509.Certificate)) *x509.Certificate {
	p.t.Helper()
	spiffeURI, _ := url.Parse("https://assets.example/h1")
	template := &x509.Certificate{
		SerialNumber: big.NewInt(0xabc), Subject: pkix.Name{CommonName: "h1.dc1.example", Organization: []string{"bank"}, Locality: []string{"dc1"}},
		DNSNames: []string{"H1.dc1.example"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1), net.IPv4zero}, URIs: []*url.URL{spiffeURI},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if edit != nil {
		edit(template)
	}
	var public any = &newKey(p.t).PublicKey
	if template.PublicKey != nil {
		public = template.PublicKey
	}
	return p.sign(template, p.cert, public, p.key)
}

func (p *pki) file() string {
	p.t.Helper()
	file := filepath.Join(p.t.TempDir(), "ca.pem")
	p.write(file)
	return file
}

func (p *pki) write(file string) {
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func fromFile(file string) func() (*x509.CertPool, error) {
	return func() (*x509.CertPool, error) {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		return ParseAnchors(text)
	}
}

func open(t testing.TB, config X509PoPConfig) *X509PoP {
	t.Helper()
	if config.Zone == "" {
		config.Zone = "dc1.example"
	}
	if config.Datacenter == "" {
		config.Datacenter = "{{label .Locality}}"
	}
	x, err := NewX509PoP(config)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func TestVerify(t *testing.T) {
	p, other := newPKI(t, "hosts"), newPKI(t, "hosts") // the other one has the same name
	x := open(t, X509PoPConfig{Anchors: fromFile(p.file()), PathPrefixes: []string{"/team/pay"}})
	leafKey := newKey(t)
	leaf := p.host(func(c *x509.Certificate) { c.PublicKey = &leafKey.PublicKey })
	_, host, err := x.Verify([][]byte{leaf.Raw}, now)
	if err != nil {
		t.Fatal(err)
	}
	if host.GetName() != "h1" || host.GetDatacenter() != "dc1" || !slices.Equal(host.GetAddresses(), []string{"h1.dc1.example", "10.0.0.1"}) ||
		host.GetCertificate() != Fingerprint(leaf.Raw) || !slices.Equal(host.GetPathPrefixes(), []string{"/team/pay"}) {
		t.Errorf("host: %v", host)
	}
	for _, want := range []string{"x509pop:subject:cn:h1.dc1.example", "x509pop:subject:o:bank", "x509pop:serialnumber:abc", "x509pop:san:dns:h1.dc1.example",
		"x509pop:san:uri:https://assets.example/h1", "x509pop:ca:fingerprint:" + Fingerprint(p.cert.Raw), "x509pop:fingerprint:" + Fingerprint(leaf.Raw)} {
		if !slices.Contains(host.GetSelectors(), want) {
			t.Errorf("no selector %s in %q", want, host.GetSelectors())
		}
	}

	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	// An intermediate that the host sends along.
	middle := &pki{t: t, key: newKey(t)}
	middle.cert = p.sign(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "middle"}, NotBefore: now.AddDate(0, -1, 0), NotAfter: now.AddDate(0, 1, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, p.cert, &middle.key.PublicKey, p.key)
	below := middle.host(nil)
	if _, host, err := x.Verify([][]byte{below.Raw, middle.cert.Raw}, now); err != nil || !slices.Contains(host.GetSelectors(), "x509pop:ca:fingerprint:"+Fingerprint(middle.cert.Raw)) {
		t.Errorf("through an intermediate: %v, %v", host, err)
	}
	chain := func(certs ...*x509.Certificate) (all [][]byte) {
		for _, c := range certs {
			all = append(all, c.Raw)
		}
		return all
	}
	for what, test := range map[string]struct {
		chain [][]byte
		want  string
	}{
		"another authority":         {chain(other.host(nil)), "does not verify"},
		"and its certificate along": {chain(other.host(nil), other.cert), "does not verify"},
		"without its intermediate":  {chain(below), "does not verify"},
		"below another host":        {chain((&pki{t: t, cert: leaf, key: leafKey}).host(nil), leaf), "does not verify"},
		"ended":                     {chain(p.host(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) })), "expired"},
		"not yet":                   {chain(p.host(func(c *x509.Certificate) { c.NotBefore = now.Add(time.Second) })), "not yet valid"},
		"no client":                 {chain(p.host(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })), "clientAuth"},
		"silent about its use":      {chain(p.host(func(c *x509.Certificate) { c.ExtKeyUsage = nil })), "clientAuth"},
		"any use":                   {chain(p.host(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} })), "clientAuth"},
		"no signature":              {chain(p.host(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })), "digitalSignature"},
		"no key usage":              {chain(p.host(func(c *x509.Certificate) { c.KeyUsage = 0 })), "digitalSignature"},
		"the authority's own":       {chain(p.cert), "authority's"},
		"an intermediate's own":     {chain(middle.cert), "authority's"},
		"a weak key":                {chain(p.host(func(c *x509.Certificate) { c.PublicKey = &weak.PublicKey })), "1024 bits"},
		"a name that is none": {chain(p.host(func(c *x509.Certificate) {
			c.DNSNames, c.Subject.CommonName = nil, "../../entente/ca/ca-1"
		})), "gives no name"},
		"no name at all": {chain(p.host(func(c *x509.Certificate) { c.DNSNames, c.Subject.CommonName = nil, "" })), "gives no name"},
		"no datacenter":  {chain(p.host(func(c *x509.Certificate) { c.Subject.Locality = nil })), "gives no datacenter"},
		"nothing":        {nil, "0 certificates"},
		"too many":       {chain(leaf, leaf, leaf, leaf, leaf, leaf, leaf), "7 certificates"},
		"no certificate": {[][]byte{[]byte("x")}, "does not parse"},
		"too large":      {[][]byte{make([]byte, maxCertificate+1)}, "over 8192"},
		"trailing bytes": {[][]byte{append(slices.Clone(leaf.Raw), 0)}, "does not parse"},
	} {
		if _, host, err := x.Verify(test.chain, now); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, %v", what, host, err)
		}
	}
}

// One damaged certificate among the authorities takes the whole file out, not itself: a host
// that was refused for it would look like one of another PKI.
func TestAnchorsAreReadWhole(t *testing.T) {
	p, next := newPKI(t, "old"), newPKI(t, "new")
	file := p.file()
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	next.write(file)
	second, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := ParseAnchors(slices.Concat(good, second))
	if err != nil {
		t.Fatal(err)
	}
	x := open(t, X509PoPConfig{Anchors: func() (*x509.CertPool, error) { return pool, nil }})
	for _, by := range []*pki{p, next} { // control
		if _, _, err := x.Verify([][]byte{by.host(nil).Raw}, now); err != nil {
			t.Error(err)
		}
	}
	for what, text := range map[string][]byte{
		"cut off": slices.Concat(good, second[:len(second)-20]), "glued": slices.Concat(bytes.TrimSpace(good), second),
		"indented": slices.Concat(good, []byte(" "), second), "byte order mark": slices.Concat([]byte("\xef\xbb\xbf"), good),
		"bad letter": slices.Concat(good, bytes.Replace(second, []byte("A"), []byte("!"), 1)),
	} {
		if _, err := ParseAnchors(text); err == nil || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestConfig(t *testing.T) {
	p := newPKI(t, "hosts")
	file := p.file()
	leafFile := filepath.Join(t.TempDir(), "leaf.pem")
	if err := os.WriteFile(leafFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.host(nil).Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]X509PoPConfig{
		"no file":              {Zone: "dc1.example", Anchors: fromFile(file + "x"), Datacenter: "dc1"},
		"a leaf":               {Zone: "dc1.example", Anchors: fromFile(leafFile), Datacenter: "dc1"},
		"no datacentr":         {Zone: "dc1.example", Anchors: fromFile(file)},
		"no field":             {Zone: "dc1.example", Anchors: fromFile(file), Datacenter: "{{.Nothing}}"},
		"no template":          {Zone: "dc1.example", Anchors: fromFile(file), Datacenter: "dc1", Name: "{{"},
		"no function":          {Zone: "dc1.example", Anchors: fromFile(file), Datacenter: "dc1", Name: `{{exec "x"}}`},
		"endless":              {Zone: "dc1.example", Anchors: fromFile(file), Datacenter: "dc1", Name: `{{printf "%1000d" 1}}`},
		"no zone":              {Anchors: fromFile(file), Datacenter: "dc1"},
		"no zone, with a name": {Anchors: fromFile(file), Datacenter: "dc1", Name: "{{label .CommonName}}"},
		"odd zone":             {Zone: "dc1 example", Anchors: fromFile(file), Datacenter: "dc1"},
		"scope":                {Zone: "dc1.example", Anchors: fromFile(file), Datacenter: "dc1", PathPrefixes: []string{"team"}},
	} {
		if _, err := NewX509PoP(c); err == nil {
			t.Error(what)
		}
	}
	x := open(t, X509PoPConfig{Anchors: fromFile(file), Datacenter: "dc1", Name: "host-{{.SerialNumber}}"})
	if _, host, err := x.Verify([][]byte{p.host(nil).Raw}, now); err != nil || host.GetName() != "host-abc" {
		t.Errorf("%v, %v", host, err)
	}
}

// Whatever a host sends: an answer, and never a host that was not vouched for.
func FuzzVerify(f *testing.F) {
	p := newPKI(f, "hosts")
	x := open(f, X509PoPConfig{Anchors: fromFile(p.file())})
	leaf := p.host(nil)
	f.Add(leaf.Raw, p.cert.Raw)
	f.Add(p.cert.Raw, leaf.Raw)
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		got, host, err := x.Verify([][]byte{first, second}, now)
		if err == nil && (got.CheckSignatureFrom(p.cert) != nil || host.GetName() == "") {
			t.Fatalf("%v from %x", host, first)
		}
	})
}

// Hosts of two names are never one agent, and a host of another zone is none.
func TestNamesOfHostsStayUniqueAndInTheirZone(t *testing.T) {
	p := newPKI(t, "hosts")
	named := func(common string, names ...string) *x509.Certificate {
		return p.host(func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames = common, names })
	}
	for _, test := range []struct {
		zone, name string
		host       *x509.Certificate
		agent      string
		refused    string
	}{
		{"prod.example", "", named("", "pay-1.prod.example"), "pay-1", ""},
		{"prod.example", "", named("", "PAY-1.Prod.Example"), "pay-1", ""}, // the same host
		{".Prod.example.", "", named("", "pay-1.prod.example"), "pay-1", ""},
		{"prod.example", "", named("pay-1.prod.example"), "pay-1", ""},
		{"prod.example", "", named("", "pay-1.guests.example"), "", "not in zone prod.example"},
		{"prod.example", "", named("", "PAY-1.printers.example"), "", "not in zone"},
		{"prod.example", "", named("", "pay-1.notprod.example"), "", "not in zone"},
		{"prod.example", "", named("", "pay-1.prod.example.guests.example"), "", "not in zone"},
		{"prod.example", "", named("", "pay-1.guests.example", "pay-1.prod.example"), "", "not in zone"},
		{"prod.example", "", named("pay-1.prod.example", "pay-1.guests.example"), "", "not in zone"},
		{"prod.example", "", named("", "prod.example"), "", "not in zone"},
		{"prod.example", "", named("pay-1"), "", "not in zone"},
		{"prod.example", "", named("", "*.prod.example"), "", "not one DNS label"},
		{"prod.example", "{{label .CommonName}}", named("pay-2.guests.example", "pay-1.prod.example"), "", "is not a name in zone"},
		{"prod.example", "{{label .CommonName}}", named("pay-2", "pay-1.prod.example"), "", "is not a name in zone"},
		{"prod.example", "h-{{.SerialNumber}}", named("", "pay-1.guests.example"), "", "not in zone"},
		{"example", "", named("", "pay-1.prod.example"), "pay-1--prod", ""},
		{"example", "", named("", "pay-1.guests.example"), "pay-1--guests", ""},
		{"example", "", named("", "pay-1--guests.example"), "", "has -- in it"},
	} {
		x := open(t, X509PoPConfig{Anchors: fromFile(p.file()), Datacenter: "dc1", Zone: test.zone, Name: test.name})
		_, host, err := x.Verify([][]byte{test.host.Raw}, now)
		what := test.host.Subject.CommonName + " " + strings.Join(test.host.DNSNames, " ")
		switch {
		case test.refused != "" && (err == nil || !strings.Contains(err.Error(), test.refused)):
			t.Errorf("%s in zone %s: agent %q, %v; want %q", what, test.zone, host.GetName(), err, test.refused)
		case test.refused == "" && (err != nil || host.GetName() != test.agent):
			t.Errorf("%s in zone %s: agent %q, %v; want %q", what, test.zone, host.GetName(), err, test.agent)
		}
	}
}
