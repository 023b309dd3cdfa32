package meshagent

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/yamlfile"
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

	CA          CAConfig          `yaml:"ca"`
	WorkloadAPI WorkloadAPIConfig `yaml:"workloadAPI"`
	Sidecar     SidecarConfig     `yaml:"sidecar"`
	Health      HealthConfig      `yaml:"health"`
	Admin       AdminConfig       `yaml:"admin"`
	AccessLog   AccessLogConfig   `yaml:"accessLog"`
	Log         LogConfig         `yaml:"log"`

	domain spiffeid.TrustDomain
	app    netip.Addr
}

// CAConfig says where the CA is, and how to be admitted.
type CAConfig struct {
	yamlfile.Pos
	// Addresses of CA nodes' APIs, host:port. A join token names some as well, and
	// the others are learned.
	Addresses []string `yaml:"addresses"`
	// Token is the one-time join token, TokenFile a file that holds it. Needed for
	// the first attestation only.
	Token     string `yaml:"token"`
	TokenFile string `yaml:"tokenFile"`
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
	// PortOffset is added to the ports of this host's services and outbound
	// listeners, so that several agents can share one address in a rehearsal:
	// a service has one port in the catalogue. 0 to 40000, default 0. What it
	// carries above 65535 cannot be reached and is unhealthy.
	PortOffset int `yaml:"portOffset,min=0,max=40000"`
}

// HealthConfig is about the health checks of this host's services.
type HealthConfig struct {
	// Interval between two checks of a service, 100ms to 1h. Default 1s.
	Interval time.Duration `yaml:"interval,min=100ms,max=1h"`
	// Timeout of one check, 10ms to 1m. Default 1s.
	Timeout time.Duration `yaml:"timeout,min=10ms,max=1m"`
}

// AdminConfig is about the admin listener.
type AdminConfig struct {
	// Listen is the host:port of /healthz, /readyz and /metrics. Empty: none.
	Listen string `yaml:"listen"`
}

// AccessLogConfig is about the sidecar's access records.
type AccessLogConfig struct {
	// File they are appended to, one JSON object per line. Empty: none.
	File string `yaml:"file"`
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
		WorkloadAPI: WorkloadAPIConfig{Socket: "/run/entente/agent.sock", Leeway: jwtsvid.DefaultLeeway},
		Sidecar:     SidecarConfig{AppAddress: "127.0.0.1"},
		Health:      HealthConfig{Interval: time.Second, Timeout: time.Second},
		Log:         LogConfig{Format: "text", Level: "info"},
	}
	if err := yamlfile.Decode(file, r, c); err != nil {
		return nil, err
	}
	if errs := c.check(); len(errs) > 0 {
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
	if c.CA.Token != "" && c.CA.TokenFile != "" {
		refuse(c.CA.At("tokenFile"), "token and tokenFile are both given: give one of them")
	}

	if c.app, err = netip.ParseAddr(c.Sidecar.AppAddress); err != nil || !c.app.IsLoopback() {
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
	return errs
}

// Domain is the trust domain.
func (c *Config) Domain() spiffeid.TrustDomain { return c.domain }

// App is the host:port of an application of this host whose service has port in the
// catalogue.
func (c *Config) App(port uint32) (string, error) {
	if port == 0 || port > 65535 {
		return "", fmt.Errorf("%d is not a port", port)
	}
	return net.JoinHostPort(c.app.String(), strconv.Itoa(int(port)+c.Sidecar.PortOffset)), nil
}
