package meshagent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/secret"
	"github.com/entente-mesh/entente/internal/yamlfile"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
	"github.com/entente-mesh/entente/meshagent/services"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// Config is the agent's file.
type Config struct {
	yamlfile.Pos

	// TrustDomain this host belongs to. Required.
	TrustDomain string `yaml:"trustDomain,required"`
	// Name of the agent, one DNS label, unique in the trust domain: its SPIFFE ID
	// is spiffe://TRUSTDOMAIN/entente/agent/NAME. Required.
	Name string `yaml:"name,required"`
	// Datacenter the host stands in: the CA nodes, gateways and instances in it
	// are preferred. Required.
	Datacenter string `yaml:"datacenter,required"`
	// DataDir holds the agent's key (mode 0600), its SVID, and what it last knew of
	// the CA. Made with mode 0700 when missing. Required.
	DataDir string `yaml:"dataDir,required"`

	// Settle is how long after a workload was given new trust anchors or a new SVID the
	// agent tells the CA that the workload uses them, 1ms to 10m. Default 10s.
	Settle time.Duration `yaml:"settle,min=1ms,max=10m"`

	CA          CAConfig            `yaml:"ca"`
	Attest      nodeattest.Sections `yaml:"attest"`
	WorkloadAPI WorkloadAPIConfig   `yaml:"workloadAPI"`
	// WorkloadAttestation says what counts of a process that asks for an identity.
	WorkloadAttestation WorkloadAttestationConfig `yaml:"workloadAttestation"`
	SDS                 SDSConfig                 `yaml:"sds"`
	Sidecar             SidecarConfig             `yaml:"sidecar"`
	Health              HealthConfig              `yaml:"health"`
	// Services say where services of this host listen and how they are checked, where
	// that differs from the catalogue.
	Services []services.Registration `yaml:"services"`
	// ServicesDir holds files NAME.yaml with the same, followed as they change. Default
	// /etc/entente/services.d.
	ServicesDir string `yaml:"servicesDir"`

	Files     []FilesConfig    `yaml:"files"`
	DNS       DNSConfig        `yaml:"dns"`
	Cache     CacheConfig      `yaml:"cache"`
	Admin     AdminConfig      `yaml:"admin"`
	AccessLog daemon.AccessLog `yaml:"accessLog"` // of the sidecar
	Log       LogConfig        `yaml:"log"`

	domain spiffeid.TrustDomain
}

// CAConfig says where the CA is, and how to be admitted.
type CAConfig struct {
	yamlfile.Pos
	// Addresses of CA nodes' APIs, host:port. A join token names some as well, and
	// the others are learned.
	Addresses []string `yaml:"addresses"`
	// Token is the one-time join token, TokenFile a file that holds it. Needed for
	// the first attestation only.
	Token     secret.Text `yaml:"token"`
	TokenFile string      `yaml:"tokenFile"`
	// BundleFile is the domain's SPIFFE bundle (JSON), by which the CA is known before
	// the first attestation. A join token says that by itself.
	BundleFile string `yaml:"bundleFile"`
	// RecoveryKey is the public half of the cluster's recovery key. A join token says it as
	// well; without either, that of the first cluster record is kept.
	RecoveryKey string `yaml:"recoveryKey"`
}

// WorkloadAPIConfig is about the SPIFFE Workload API.
type WorkloadAPIConfig struct {
	// Socket is the path of its unix socket. Default /run/entente/agent.sock (not
	// below DataDir, which is the agent's alone).
	Socket string `yaml:"socket"`
	// WIT serves WIT-SVIDs as well, whose specification is not final. Default: its
	// calls answer Unimplemented.
	WIT bool `yaml:"wit"`
	// Leeway is how much later than its exp, or earlier than its nbf, a JWT-SVID is
	// still found valid, at most 2m. Default 10s.
	Leeway time.Duration `yaml:"leeway,min=0s,max=2m"`
}

// WorkloadAttestationConfig says what counts of a process that asks for an identity.
type WorkloadAttestationConfig struct {
	// Strict lets only unix:uid and unix:user count at unix sockets on Linux before 6.5, whose
	// kernel does not say which process connected. Default false: a process that connects and
	// ends can be taken for another one of its user. From Linux 6.5 on it changes nothing.
	Strict bool `yaml:"strict"`
}

func (c WorkloadAttestationConfig) options() []workloadattest.Option {
	if c.Strict {
		return []workloadattest.Option{workloadattest.Strict}
	}
	return nil
}

// SDSConfig is about Envoy's secret discovery on the Workload API's socket. The settings
// are those of a SPIRE agent.
type SDSConfig struct {
	yamlfile.Pos
	// DefaultSVIDName is the name of the caller's first X.509-SVID. Default "default".
	DefaultSVIDName string `yaml:"defaultSVIDName"`
	// DefaultBundleName is the name of the own trust domain's bundle. Default "ROOTCA".
	DefaultBundleName string `yaml:"defaultBundleName"`
	// DefaultAllBundlesName is the name of every bundle that the caller may have. Default "ALL".
	DefaultAllBundlesName string `yaml:"defaultAllBundlesName"`
	// DisableSPIFFECertValidation sends bundles as plain lists of authorities to every
	// Envoy, as its node's metadata may ask for by itself. Default false: as a configuration of
	// Envoy's SPIFFE validator.
	DisableSPIFFECertValidation bool `yaml:"disableSPIFFECertValidation"`
}

// check refuses names that would hide one another, or a name that SDS has already.
func (s *SDSConfig) check(refuse func(at yamlfile.Pos, format string, args ...any)) {
	taken := map[string]string{}
	for _, n := range []struct{ key, name string }{
		{"defaultSVIDName", s.DefaultSVIDName}, {"defaultBundleName", s.DefaultBundleName}, {"defaultAllBundlesName", s.DefaultAllBundlesName},
	} {
		switch other := taken[n.name]; {
		case n.name == "" || len(n.name) > 255 || n.name == "*" || strings.HasPrefix(n.name, "spiffe://") || strings.ContainsFunc(n.name, unicode.IsControl) || !utf8.ValidString(n.name):
			refuse(s.At(n.key), "%.300q is no name of a secret: give 1 to 255 characters, neither * nor a SPIFFE ID, which mean something already", n.name)
		case other != "":
			refuse(s.At(n.key), "%q is %s already: Envoy could ask for one of them only", n.name, other)
		}
		taken[n.name] = n.key
	}
}

// SidecarConfig is about the data plane of this host.
type SidecarConfig struct {
	yamlfile.Pos
	// Inbound is the host:port of the mTLS listener that serves this host's
	// services to others. Empty: no sidecar, and no instances are reported.
	Inbound string `yaml:"inbound"`
	// Advertise is the host:port at which others reach Inbound. Default Inbound.
	Advertise string `yaml:"advertise"`
	// AppAddress is the loopback address the host's applications listen on.
	// Default 127.0.0.1.
	AppAddress string `yaml:"appAddress"`
	// Sockets is a directory with an outbound unix socket for each service of this host,
	// NAME.sock, by which it calls others: nobody else can take it while the agent is down,
	// as they can an outbound port. Default: workloadAPI.socket with -outbound in the place
	// of .sock, if that leaves room for names; "-": none.
	Sockets string `yaml:"sockets"`
	// PortOffset is added to the ports of this host's services and outbound
	// listeners, so that several agents can share one address in a rehearsal:
	// a service has one port in the catalogue. 0 to 40000, default 0. What it
	// carries above 65535 cannot be reached and is unhealthy.
	PortOffset int `yaml:"portOffset,min=0,max=40000"`
}

// HealthConfig is about the health checks of this host's services: what a registration of
// theirs does not say.
type HealthConfig struct {
	services.Thresholds

	// Commands check services of this host in the place of what the catalogue says:
	// by the service's name, a command with its arguments, no shell. It is healthy
	// when the command exits with 0. They stand here only, since whoever could put
	// one into the catalogue could run anything on every host.
	Commands map[string][]string `yaml:"commands"`
}

// FilesConfig has one identity written to files, for software that reads nothing else.
type FilesConfig struct {
	yamlfile.Pos
	// Service whose identity it is: NAME of a Service that runs on this host. Required.
	Service string `yaml:"service,required"`
	// Certificate is the path of the certificate chain, Key of its private key
	// (PKCS #8), Combined of both in one file, Bundle of the own trust domain's
	// authorities: all PEM. BundleMap is the path of a SPIFFE bundle map of all trust
	// domains that the identity verifies peers of. Absolute; each may be left out.
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
	Combined    string `yaml:"combined"`
	Bundle      string `yaml:"bundle"`
	BundleMap   string `yaml:"bundleMap"`
	// JWTs are JWT-SVIDs of the service, each in a file of its own with nothing else in it.
	JWTs []JWTFileConfig `yaml:"jwts"`
	// Owner and Group of the files, by name or number. Default: the agent's.
	Owner string `yaml:"owner"`
	Group string `yaml:"group"`
	// Mode of the files that hold the key or a JWT-SVID. Default 0600; others get none of it. The
	// files that hold no secret have 0644.
	Mode FileMode `yaml:"mode"`
	// After every change this is run or signalled.
	After AfterConfig `yaml:"after"`
}

// JWTFileConfig is a file with one JWT-SVID, written anew after half of its life.
type JWTFileConfig struct {
	yamlfile.Pos
	// Path of the file, absolute. Required.
	Path string `yaml:"path,required"`
	// Audience of the token, one or more. Required.
	Audience []string `yaml:"audience,required"`
}

// DNSConfig gives the services that this host may call names that resolve.
type DNSConfig struct {
	yamlfile.Pos
	// Listen is the loopback address and port at which questions are answered:
	// 127.80.0.1:53. Empty: none, and services are called through outbound ports only.
	Listen string `yaml:"listen"`
	// Network is the /16 of loopback in which every service gets an address. Default
	// 127.80.0.0/16; agents that share one machine need networks of their own.
	Network string `yaml:"network"`
	// HTTPPort is where every service answers besides its own port, so that
	// http://accounts.banking.example/ needs none. Default 80; -1: nowhere.
	HTTPPort int `yaml:"httpPort,min=-1,max=65535"`
}

// CacheConfig has what the agent holds kept in DataDir, keys included, so that an
// agent that is restarted while no CA can be reached serves at once.
type CacheConfig struct {
	yamlfile.Pos
	// PassphraseFile seals it with the passphrase in this file, mode 0600. With neither of
	// the two nothing is kept.
	PassphraseFile string `yaml:"passphraseFile"`
	// SystemdCredential seals it with the passphrase in the systemd credential of this
	// name, which the unit loads.
	SystemdCredential string `yaml:"systemdCredential"`
}

// AfterConfig tells software that its files are other ones.
type AfterConfig struct {
	yamlfile.Pos
	// Command with its arguments; no shell. It runs as the agent does.
	Command []string `yaml:"command"`
	// Timeout of Command, 100ms to 1h. Default 30s.
	Timeout time.Duration `yaml:"timeout,min=100ms,max=1h"`
	// Signal for the process whose number stands in PIDFile.
	Signal  string `yaml:"signal,oneof=HUP|USR1|USR2"`
	PIDFile string `yaml:"pidFile"`
}

// FileMode is a file's permissions, written in octal: 0640.
type FileMode fs.FileMode

// UnmarshalText reads up to four octal digits.
func (m *FileMode) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 8, 9)
	if err != nil || len(text) < 3 || len(text) > 4 {
		return errors.New("a mode is written in octal digits, as in 0640")
	}
	*m = FileMode(n)
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (m FileMode) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%04o", uint32(m)), nil }

// Paths are the files that are to be written.
func (f *FilesConfig) Paths() (paths []string) {
	for _, path := range []string{f.Certificate, f.Key, f.Combined, f.Bundle, f.BundleMap} {
		if path != "" {
			paths = append(paths, path)
		}
	}
	for _, jwt := range f.JWTs {
		paths = append(paths, jwt.Path)
	}
	return paths
}

// checkFiles looks at every entry of files, and fills in its defaults.
func (c *Config) checkFiles() (errs yamlfile.Errors) {
	written := map[string]bool{}
	for i := range c.Files {
		f := &c.Files[i]
		refuse := func(key, format string, args ...any) { errs = append(errs, f.At(key).Errorf(format, args...)) }
		if err := ca.CheckLabel(f.Service); err != nil {
			refuse("service", "%v", err)
		}
		if len(f.Paths()) == 0 {
			refuse("service", "nothing is to be written: give certificate, key, combined, bundle, bundleMap or jwts")
		}
		for _, path := range append(f.Paths(), f.After.PIDFile) {
			if path != "" && (!filepath.IsAbs(path) || filepath.Clean(path) != path) {
				refuse("service", "%q is not an absolute path in its shortest form", path)
			}
		}
		for _, path := range f.Paths() {
			if written[path] {
				refuse("service", "%s is written twice", path)
			}
			written[path] = true
		}
		for _, jwt := range f.JWTs {
			if err := CheckAudience(jwt.Audience); err != nil {
				errs = append(errs, jwt.At("audience").Errorf("%v", err))
			}
		}
		if f.Mode == 0 {
			f.Mode = 0o600
		}
		if f.Mode&0o007 != 0 {
			refuse("mode", "mode %04o lets every user of the host read the secret: give it to a group, as in 0640", uint32(f.Mode))
		}
		if f.After.Timeout == 0 {
			f.After.Timeout = 30 * time.Second
		}
		switch {
		case len(f.After.Command) > 0 && f.After.Signal != "":
			refuse("after", "command and signal are both given: give one of them")
		case (f.After.Signal == "") != (f.After.PIDFile == ""):
			refuse("after", "signal and pidFile belong together")
		}
	}
	return errs
}

// AdminConfig is about the admin listener.
type AdminConfig struct {
	// Listen is the host:port of /healthz, /readyz and /metrics. Empty: none.
	Listen string `yaml:"listen"`
	// Socket is the path of the unix socket (mode 0600) for the verbs of the host's
	// administrator. Default admin.sock in DataDir.
	Socket string `yaml:"socket"`
}

// LogConfig is about the process's log.
type LogConfig struct {
	Format string `yaml:"format,oneof=text|json"`            // default text
	Level  string `yaml:"level,oneof=debug|info|warn|error"` // default info
}

// ReadConfig reads a configuration, fills in the defaults and checks it. Errors
// name the file and the line.
func ReadConfig(file string, r io.Reader) (*Config, error) {
	c := &Config{
		Settle:      10 * time.Second,
		WorkloadAPI: WorkloadAPIConfig{Socket: "/run/entente/agent.sock", Leeway: jwtsvid.DefaultLeeway},
		SDS:         SDSConfig{DefaultSVIDName: "default", DefaultBundleName: "ROOTCA", DefaultAllBundlesName: "ALL"},
		Sidecar:     SidecarConfig{AppAddress: "127.0.0.1"},
		DNS:         DNSConfig{Network: "127.80.0.0/16", HTTPPort: 80},
		Health:      HealthConfig{Thresholds: services.Defaults()},
		ServicesDir: "/etc/entente/services.d",
		Log:         LogConfig{Format: "text", Level: "info"},
	}
	if err := yamlfile.Decode(file, r, c); err != nil {
		return nil, err
	}
	errs := c.check()
	if err := c.AccessLog.Complete(); err != nil {
		errs = append(errs, c.At("accessLog").Errorf("%v", err))
	}
	if len(errs) > 0 {
		return nil, errs
	}
	return c, nil
}

// check looks at what single values cannot show, and parses what others need.
func (c *Config) check() (errs yamlfile.Errors) {
	refuse := func(at yamlfile.Pos, format string, args ...any) {
		errs = append(errs, at.Errorf(format, args...))
	}
	var err error
	if c.domain, err = ca.ParseTrustDomain(c.TrustDomain); err != nil {
		refuse(c.At("trustDomain"), "%v", err)
	}
	if err := ca.CheckLabel(c.Name); err != nil {
		refuse(c.At("name"), "%v", err)
	}
	if err := ca.CheckLabel(c.Datacenter); err != nil {
		refuse(c.At("datacenter"), "%v", err)
	}
	for _, address := range c.CA.Addresses {
		if err := ca.CheckAddress(address); err != nil {
			refuse(c.CA.At("addresses"), "%v", err)
		}
	}
	if c.CA.RecoveryKey != "" {
		if _, err := ca.ParseRecoveryPublic(c.CA.RecoveryKey); err != nil {
			refuse(c.CA.At("recoveryKey"), "%v", err)
		}
	}
	if !c.CA.Token.IsZero() && c.CA.TokenFile != "" {
		refuse(c.CA.At("tokenFile"), "token and tokenFile are both given: give one of them")
	}
	switch at, what, err := c.Attest.Check(); {
	case err != nil:
		refuse(at, "%v", err)
	case what == "":
	case !c.CA.Token.IsZero() || c.CA.TokenFile != "":
		refuse(at, "the host is admitted by %s or by a join token, not by both: leave one out", what)
	case c.CA.BundleFile == "" || len(c.CA.Addresses) == 0:
		refuse(at, "ca.addresses and ca.bundleFile are needed: without a join token nothing else says which CA to believe")
	}

	if app, err := netip.ParseAddr(c.Sidecar.AppAddress); err != nil || !app.IsLoopback() {
		refuse(c.Sidecar.At("appAddress"), "%q is not a loopback address: traffic to the application may not leave the host unprotected", c.Sidecar.AppAddress)
	}
	if c.Sidecar.Advertise == "" {
		c.Sidecar.Advertise = c.Sidecar.Inbound
	}
	if c.Sidecar.Inbound != "" {
		if err := ca.CheckAddress(c.Sidecar.Inbound); err != nil {
			refuse(c.Sidecar.At("inbound"), "%v", err)
		}
		host, _, _ := net.SplitHostPort(c.Sidecar.Advertise)
		if err := ca.CheckAddress(c.Sidecar.Advertise); err != nil {
			refuse(c.Sidecar.At("advertise"), "%v", err)
		} else if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
			refuse(c.Sidecar.At("inbound"), "nobody can be told to dial %s: add advertise with the address at which others reach this host", host)
		}
	}
	// sun_path has 108 bytes on Linux and 104 on darwin, the final zero included.
	if len(c.WorkloadAPI.Socket) > 103 || strings.ContainsRune(c.WorkloadAPI.Socket, 0) {
		refuse(c.Pos, "the Workload API's socket %s: the path of a unix socket has at most 103 bytes; set workloadAPI.socket", c.WorkloadAPI.Socket)
	}
	const room = len("/.sock") + 63 // a service's name is one DNS label
	switch dir := &c.Sidecar.Sockets; {
	case *dir == "-":
		*dir = ""
	case *dir == "":
		if *dir = strings.TrimSuffix(c.WorkloadAPI.Socket, ".sock") + "-outbound"; len(*dir)+room > 103 || !filepath.IsAbs(*dir) {
			*dir = ""
		}
	case !filepath.IsAbs(*dir) || len(*dir)+room > 103 || strings.ContainsRune(*dir, 0):
		refuse(c.Sidecar.At("sockets"), "%q is not an absolute path of at most %d bytes: the path of a unix socket has at most 103", *dir, 103-room)
	}
	for name, command := range c.Health.Commands {
		if err := services.CheckCommand(command); err != nil {
			refuse(c.Pos, "health.commands.%s: %v", name, err)
		}
	}
	if network, err := netip.ParsePrefix(c.DNS.Network); err != nil || network.Bits() != 16 || !network.Addr().Is4() || !network.Addr().IsLoopback() || network.Masked() != network {
		refuse(c.DNS.At("network"), "%q is not a /16 of loopback, as 127.80.0.0/16 is", c.DNS.Network)
	}
	if c.DNS.Listen != "" {
		if at, err := netip.ParseAddrPort(c.DNS.Listen); err != nil || !at.Addr().IsLoopback() {
			refuse(c.DNS.At("listen"), "%q is not a loopback address and port, as 127.80.0.1:53 is", c.DNS.Listen)
		}
		if c.Sidecar.Inbound == "" {
			refuse(c.DNS.At("listen"), "names lead to the sidecar, and there is none: set sidecar.inbound")
		}
	}
	c.SDS.check(refuse)
	if c.Cache.PassphraseFile != "" && c.Cache.SystemdCredential != "" {
		refuse(c.Cache.At("systemdCredential"), "passphraseFile and systemdCredential are both given: give one of them")
	}
	if c.Admin.Socket == "" {
		c.Admin.Socket = filepath.Join(c.DataDir, "admin.sock")
	}
	if !filepath.IsAbs(c.ServicesDir) {
		refuse(c.At("servicesDir"), "%q is not an absolute path", c.ServicesDir)
	}
	errs = append(errs, services.Inspect(c.Services)...)
	return append(errs, c.checkFiles()...)
}

// Domain is the trust domain.
func (c *Config) Domain() spiffeid.TrustDomain { return c.domain }

// App is the host:port of an application of this host whose service has port in the
// catalogue, if the host says nothing else of it.
func (c *Config) App(port uint32) (string, error) {
	if port == 0 || port > 65535 {
		return "", fmt.Errorf("%d is not a port", port)
	}
	return net.JoinHostPort(c.Sidecar.AppAddress, strconv.Itoa(int(port)+c.Sidecar.PortOffset)), nil
}
