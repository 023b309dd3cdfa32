package node

import (
	"crypto"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/ca/nodeattest"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Config is the file of `entente ca`.
type Config struct {
	yamlfile.Pos

	// TrustDomain is the domain whose authority this node is, as in banking.example.
	TrustDomain string `yaml:"trustDomain,required"`
	// Name is this node's, one DNS label, unique in the cluster.
	Name string `yaml:"name,required"`
	// Datacenter is where it stands, one DNS label.
	Datacenter string `yaml:"datacenter,required"`
	// DataDir holds the log, the snapshots, the sealed keys. Mode 0700.
	DataDir string `yaml:"dataDir,required"`

	Listen    Listen    `yaml:"listen"`
	Advertise Advertise `yaml:"advertise"`
	// Socket is the unix socket for operators, mode 0600. Default: DataDir/admin.sock.
	Socket string `yaml:"socket"`

	OIDC     OIDC     `yaml:"oidc"`
	Keys     Keys     `yaml:"keys"`
	Upstream Upstream `yaml:"upstream"`
	// Lifetimes are the domain's. They are read by init only.
	Lifetimes Lifetimes `yaml:"lifetimes"`
	// MinVoters is how many voters a removal leaves at least; 0: one. Read by init only.
	MinVoters int `yaml:"minVoters"`
	// ReissueRate is how many SVIDs this node asks its agents and gateways to have signed
	// in the whole domain, a second, when an authority is tainted. Default 4000/s.
	ReissueRate         yamlfile.Rate `yaml:"reissueRate"`
	nodeattest.Sections               // hosts that are admitted without a join token
	Limits              Limits        `yaml:"limits"`

	Timing Timing `yaml:"timing"`
	Audit  Audit  `yaml:"audit"`
	Log    Log    `yaml:"log"`

	// Tests of this package fail or stall the log's disk, keep entries from a member, and
	// set this node's clock alone.
	beforeWrite func() error
	step        func(string) // called with where a procedure is; tests only
	holdBack    func(member string) bool
	clockError  func() time.Duration
	// pretendLevel: this node says that its feature level is another.
	pretendLevel uint32
	compareEvery uint64 // 0: checksumEvery
}

// Listen is where the node listens, each HOST:PORT.
type Listen struct {
	yamlfile.Pos

	// Raft is for the other CA nodes.
	Raft string `yaml:"raft,required"`
	// API is for agents, gateways and the other CA nodes.
	API string `yaml:"api,required"`
	// Bundle serves the SPIFFE bundle to other domains. Empty: not served.
	Bundle string `yaml:"bundle"`
	// Admin serves /healthz, /readyz and /metrics. Empty: not served.
	Admin string `yaml:"admin"`
}

// OIDC makes JWT-SVIDs verifiable for those that know OpenID Connect and not SPIFFE:
// clouds, databases, API gateways.
type OIDC struct {
	yamlfile.Pos

	// Issuer is the "iss" of this domain's JWT-SVIDs, an https URL at which the
	// listeners of the CA nodes are reached: the same at every node. Empty: JWT-SVIDs
	// name no issuer.
	Issuer string `yaml:"issuer"`
	// Listen is the HOST:PORT of the discovery document and the keys, below the
	// issuer's path. Empty: not served.
	Listen string `yaml:"listen"`
	// CertFile and KeyFile are the certificate that the public knows the issuer's host
	// by, PEM. They are read again when they change.
	CertFile string `yaml:"certFile"`
	KeyFile  string `yaml:"keyFile"`
}

// Advertise is where others reach the node. Default: where it listens.
type Advertise struct {
	yamlfile.Pos

	Raft string `yaml:"raft"`
	API  string `yaml:"api"`
}

// Keys says how the node's keys are kept. One of the first four is needed.
type Keys struct {
	yamlfile.Pos

	// PassphraseFile seals them with the passphrase in this file, mode 0600.
	PassphraseFile string `yaml:"passphraseFile"`
	// SystemdCredential seals them with the passphrase in the systemd credential of this
	// name, which the unit loads.
	SystemdCredential string `yaml:"systemdCredential"`
	// PKCS11 keeps them in a token, which they never leave. For binaries that were built
	// with -tags pkcs11.
	PKCS11 PKCS11 `yaml:"pkcs11"`
	// InsecureDev leaves them unsealed, allows loopback addresses only, and marks the
	// cluster as one for development.
	InsecureDev bool `yaml:"insecureDev"`
	// JWT is the algorithm of this node's next JWT key. Default ES256; RS256 for
	// verifiers that know nothing else.
	JWT string `yaml:"jwt,oneof=ES256|RS256"`
}

// PKCS11 is where a hardware security module is found. A node finds its keys again by
// their labels, LABEL/NAME.
type PKCS11 struct {
	yamlfile.Pos

	// Module is the vendor's library, an absolute path.
	Module string `yaml:"module"`
	// Token is the label of the token.
	Token string `yaml:"token"`
	// PINFile holds its user PIN, mode 0600.
	PINFile string `yaml:"pinFile"`
	// PINCredential is the name of a systemd credential with the PIN, in place of PINFile.
	PINCredential string `yaml:"pinCredential"`
	// Label is what the labels of this node's keys begin with. Default: entente/TRUSTDOMAIN/NAME.
	Label string `yaml:"label"`
}

// Upstream is a root that certifies this node's X.509 authorities, and stands in the
// bundle in their place. It belongs to this trust domain alone. Empty: they sign
// themselves.
type Upstream struct {
	yamlfile.Pos

	// Certificate is the root's, PEM.
	Certificate string `yaml:"certificate"`
	// Key is the root's, sealed by `entente ca seal`; plain PEM with keys.insecureDev only.
	Key string `yaml:"key"`
	// KeyCredential is the name of a systemd credential with the key, PEM, in place of Key.
	KeyCredential string `yaml:"keyCredential"`
}

// Lifetimes of what the domain issues; zero: the default.
type Lifetimes struct {
	yamlfile.Pos

	X509SVID          time.Duration `yaml:"x509SVID,min=1s,max=87600h"`          // 12h
	AgentSVID         time.Duration `yaml:"agentSVID,min=1s,max=87600h"`         // as x509SVID
	Phase             time.Duration `yaml:"phase,min=1s,max=87600h"`             // 48h
	BundleRefreshHint time.Duration `yaml:"bundleRefreshHint,min=1s,max=87600h"` // 5m
	JWTSVID           time.Duration `yaml:"jwtSVID,min=1s,max=1h"`               // 5m, at most 1h
	WITSVID           time.Duration `yaml:"witSVID,min=1s,max=24h"`              // 1h, at most 24h
}

// Timing is Raft's.
type Timing struct {
	yamlfile.Pos

	// Heartbeat is how long a follower waits for its leader. Default 500ms.
	Heartbeat time.Duration `yaml:"heartbeat"`
}

// Limits are how much this node issues; who asks for more is told when to come back, and
// may ask another node.
type Limits struct {
	yamlfile.Pos

	// X509PerAgent is how many X.509-SVIDs one agent may have signed, 10 s of them at
	// once. Default 5000/s.
	X509PerAgent yamlfile.Rate `yaml:"x509PerAgent"`
	// TokensPerAgent is how many JWT- and WIT-SVIDs one agent may have signed. Default
	// 5000/s.
	TokensPerAgent yamlfile.Rate `yaml:"tokensPerAgent"`
	// TokensPerEntry is how many of them may be for one entry, on each of its hosts, 5 s
	// of them at once. Default 200/s.
	TokensPerEntry yamlfile.Rate `yaml:"tokensPerEntry"`
	// PerNode is how many SVIDs this node signs for all agents. Default: as many as it can.
	PerNode yamlfile.Rate `yaml:"perNode"`
	// Attests is how many hosts may attest at once. Default 32.
	Attests int `yaml:"attests,min=0,max=4096"`
	// AttestsPerSource is how often one address (IPv6: one /64) may ask to be admitted, 10 s
	// of them at once. Default 200/s.
	AttestsPerSource yamlfile.Rate `yaml:"attestsPerSource"`
	// Waiting is how many SVIDs may wait for their turn, 250ms at most. Default 1024.
	Waiting int `yaml:"waiting,min=0,max=1048576"`
}

// Audit is where each administrative act and each SVID is recorded, a line of JSON each.
type Audit struct {
	yamlfile.Pos

	// File is appended to; after it was moved away, SIGHUP begins a new one. Default:
	// DataDir/audit.log. "stderr" writes to standard error, "off" records nothing.
	File string `yaml:"file"`
	// MaxSize bounds File and the files beside it that were rotated, NAME.* and NAME-*. An
	// eighth of it is rotated to NAME.TIME. At three quarters SVIDs are counted for each
	// entry and minute, and the rest is for administrative acts. Default 1GiB, at least
	// 1MiB.
	MaxSize yamlfile.Size `yaml:"maxSize"`
	// Required refuses what administrators would change while the log cannot be written.
	// Default: it is done, and an alarm says that it goes unrecorded.
	Required bool `yaml:"required"`
}

// Log is how the node logs.
type Log struct {
	Format string `yaml:"format,oneof=text|json"`
	Level  string `yaml:"level,oneof=debug|info|warn|error"`
}

// ReadConfig reads the file, fills in defaults and checks it. file is its name, for
// complaints; relative paths in it are taken as they are.
func ReadConfig(file string, r io.Reader) (*Config, error) {
	cfg := &Config{}
	if err := yamlfile.Decode(file, r, cfg); err != nil {
		return nil, err
	}
	if err := cfg.Complete(); err != nil {
		return nil, err
	}
	return cfg, nil
}

// Complete fills in defaults and checks what was set. New, Init and Join call it.
func (c *Config) Complete() error {
	if c.Advertise.Raft == "" {
		c.Advertise.Raft = c.Listen.Raft
	}
	if c.Advertise.API == "" {
		c.Advertise.API = c.Listen.API
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.DataDir, "admin.sock")
	}
	if c.Audit.File == "" {
		c.Audit.File = filepath.Join(c.DataDir, "audit.log")
	}
	if c.Audit.MaxSize.Bytes == 0 {
		c.Audit.MaxSize.Bytes = 1 << 30
	}
	var errs yamlfile.Errors
	check := func(at yamlfile.Pos, what string, err error) {
		if err != nil {
			errs = append(errs, at.Errorf("%s: %v", what, err))
		}
	}
	td, err := ca.ParseTrustDomain(c.TrustDomain)
	if err == nil && slices.Contains(strings.Split(td.Name(), "."), "") {
		// SPIFFE allows it; crypto/x509 reads no certificate with it, our own neither.
		err = fmt.Errorf("%q begins or ends with a dot or has two in a row: its certificates could not be read", td.Name())
	}
	check(c.At("trustDomain"), "trustDomain", err)
	check(c.At("name"), "name", ca.CheckLabel(c.Name))
	check(c.At("datacenter"), "datacenter", ca.CheckLabel(c.Datacenter))
	if c.DataDir == "" {
		check(c.At("dataDir"), "dataDir", errors.New("is missing"))
	}
	for _, a := range []struct {
		pos      yamlfile.Pos
		section  string
		key      string
		address  string
		optional bool
	}{
		{c.Listen.Pos, "listen", "raft", c.Listen.Raft, false},
		{c.Listen.Pos, "listen", "api", c.Listen.API, false},
		{c.Listen.Pos, "listen", "bundle", c.Listen.Bundle, true},
		{c.Listen.Pos, "listen", "admin", c.Listen.Admin, true},
		{c.OIDC.Pos, "oidc", "listen", c.OIDC.Listen, true},
		{c.Advertise.Pos, "advertise", "raft", c.Advertise.Raft, false},
		{c.Advertise.Pos, "advertise", "api", c.Advertise.API, false},
	} {
		if a.address == "" && a.optional {
			continue
		}
		check(a.pos.At(a.key), a.section+"."+a.key, c.checkAddress(a.section, a.address))
	}
	if c.OIDC.Issuer != "" {
		check(c.OIDC.At("issuer"), "oidc.issuer", server.CheckIssuer(c.OIDC.Issuer))
	}
	if c.OIDC.Listen != "" && (c.OIDC.Issuer == "" || c.OIDC.CertFile == "" || c.OIDC.KeyFile == "") {
		check(c.OIDC.At("listen"), "oidc.listen", errors.New("needs issuer, certFile and keyFile beside it"))
	}
	check(c.At("keys"), "keys", c.Keys.check())
	if c.Keys.PKCS11.Module != "" && c.Keys.PKCS11.Label == "" {
		c.Keys.PKCS11.Label = "entente/" + c.TrustDomain + "/" + c.Name
	}
	check(c.At("upstream"), "upstream", c.Upstream.check())
	if h := c.Timing.Heartbeat; h != 0 && (h < 50*time.Millisecond || h > time.Minute) {
		check(c.Timing.At("heartbeat"), "timing.heartbeat", fmt.Errorf("%v is not between 50ms and 1m", h))
	}
	c.Sections.Check(func(section string, err error) { check(c.At(section), section, err) })
	if c.Audit.MaxSize.Bytes < 1<<20 {
		check(c.Audit.At("maxSize"), "audit.maxSize", errors.New("is less than 1MiB: administrative acts would have no room"))
	}
	if c.MinVoters < 0 || c.MinVoters > 15 {
		check(c.At("minVoters"), "minVoters", fmt.Errorf("%d is not between 0 and 15", c.MinVoters))
	}
	check(c.At("lifetimes"), "lifetimes", ca.LifetimesOf(c.Lifetimes.record()).Check())
	if len(errs) > 0 {
		return errs
	}
	return nil
}

// checkAddress allows any host to listen on, since that may be all of them, but only
// one that others can dial to be advertised.
func (c *Config) checkAddress(section, address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q is not HOST:PORT", address)
	}
	if section == "advertise" {
		if err := ca.CheckAddress(address); err != nil {
			return err
		}
		if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
			return fmt.Errorf("%s is no address that others can dial; set advertise", address)
		}
	}
	if ip := net.ParseIP(host); c.Keys.InsecureDev && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("%s is no loopback address, and with keys.insecureDev nothing else is allowed", address)
	}
	return nil
}

func (l Lifetimes) record() *statev1.Lifetimes {
	seconds := func(d time.Duration) uint32 { return uint32(d / time.Second) }
	return &statev1.Lifetimes{
		X509SvidSeconds:          seconds(l.X509SVID),
		AgentSvidSeconds:         seconds(l.AgentSVID),
		PhaseSeconds:             seconds(l.Phase),
		BundleRefreshHintSeconds: seconds(l.BundleRefreshHint),
		JwtSvidSeconds:           seconds(l.JWTSVID),
		WitSvidSeconds:           seconds(l.WITSVID),
	}
}

func (c *Config) trustDomain() spiffeid.TrustDomain {
	td, _ := ca.ParseTrustDomain(c.TrustDomain) // Complete has seen it
	return td
}

func (k Keys) check() error {
	ways := 0
	for _, set := range []bool{k.PassphraseFile != "", k.SystemdCredential != "", k.PKCS11.set(), k.InsecureDev} {
		if set {
			ways++
		}
	}
	token := k.PKCS11
	switch {
	case ways != 1:
		return errors.New("set exactly one of passphraseFile, systemdCredential, pkcs11, and, for development, insecureDev")
	case !token.set():
		return nil
	case !keystore.PKCS11:
		return keystore.ErrNoPKCS11
	case !filepath.IsAbs(token.Module) || token.Token == "":
		return errors.New("pkcs11 needs module, an absolute path, and token")
	case (token.PINFile == "") == (token.PINCredential == ""):
		return errors.New("pkcs11 needs pinFile or pinCredential")
	}
	return nil
}

func (p PKCS11) set() bool {
	return p.Module+p.Token+p.PINFile+p.PINCredential+p.Label != ""
}

func (u Upstream) check() error {
	switch {
	case u.Certificate+u.Key+u.KeyCredential == "":
		return nil
	case u.Certificate == "":
		return errors.New("needs certificate")
	case (u.Key == "") == (u.KeyCredential == ""):
		return errors.New("needs key or keyCredential")
	}
	return nil
}

// keys is a node's key store: files, or a token.
type keys interface {
	Create(name string) (crypto.Signer, error)
	CreateRSA(name string) (crypto.Signer, error)
	Load(name string) (crypto.Signer, error)
	LoadOrCreate(name string) (crypto.Signer, error)
	Delete(name string) error
	Names() ([]string, error)
}

func (c *Config) openKeys() (keys, error) {
	if token := c.Keys.PKCS11; token.Module != "" {
		return keystore.OpenToken(keystore.TokenConfig{
			Module: token.Module, Token: token.Token, Label: token.Label,
			PINFile: token.PINFile, PINCredential: token.PINCredential,
		})
	}
	sealer, err := c.sealer()
	if err != nil {
		return nil, err
	}
	return keystore.Open(filepath.Join(c.DataDir, "keys"), sealer)
}

// sealer is how key files of this node are sealed.
func (c *Config) sealer() (keystore.Sealer, error) {
	switch {
	case c.Keys.InsecureDev:
		return keystore.Plain(), nil
	case c.Keys.PassphraseFile != "":
		return keystore.PassphraseFile(c.Keys.PassphraseFile)
	case c.Keys.SystemdCredential != "":
		return keystore.Credential(c.Keys.SystemdCredential)
	}
	return nil, errors.New("a node whose keys are in a PKCS#11 token has nothing to seal key files with: give the key as a systemd credential (keyCredential)")
}
