package meshagent

import (
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Config is the agent's file.
type Config struct {
	// TrustDomain this host belongs to. Required.
	TrustDomain string `yaml:"trustDomain"`
	// Name of the agent, one DNS label, unique in the trust domain: its SPIFFE ID
	// is spiffe://TRUSTDOMAIN/entente/agent/NAME. Required.
	Name string `yaml:"name"`
	// Datacenter the host stands in. Required: nearest CA nodes, gateways and
	// instances are chosen by it.
	Datacenter string `yaml:"datacenter"`
	// DataDir holds the agent's key (mode 0600), its SVID and what it last knew
	// of the CA. Required; made with mode 0700 when missing.
	DataDir string `yaml:"dataDir"`

	CA struct {
		// Addresses of CA nodes' APIs, host:port. Required unless the token
		// names them.
		Addresses []string `yaml:"addresses"`
		// Token is the one-time join token; TokenFile a file that holds it.
		// Needed for the first attestation only.
		Token     string `yaml:"token"`
		TokenFile string `yaml:"tokenFile"`
	} `yaml:"ca"`

	WorkloadAPI struct {
		// Socket is the path of the Workload API's unix socket.
		// Default DATADIR/workload.sock.
		Socket string `yaml:"socket"`
	} `yaml:"workloadAPI"`

	Sidecar struct {
		// Inbound is the host:port of the mTLS listener that others reach this
		// host's services at; empty: no sidecar.
		Inbound string `yaml:"inbound"`
		// AppAddress is the loopback address the host's applications listen on.
		// Default 127.0.0.1.
		AppAddress string `yaml:"appAddress"`
	} `yaml:"sidecar"`

	Health struct {
		// Interval between two checks of a service. Default 1s.
		Interval time.Duration `yaml:"interval"`
		// Timeout of one check. Default 1s.
		Timeout time.Duration `yaml:"timeout"`
	} `yaml:"health"`

	Admin struct {
		// Listen is the host:port of /healthz, /readyz and /metrics; empty: none.
		Listen string `yaml:"listen"`
	} `yaml:"admin"`

	AccessLog struct {
		// File the sidecar's access records are appended to; empty: none.
		File string `yaml:"file"`
	} `yaml:"accessLog"`

	Log struct {
		Format string `yaml:"format"` // text (default) or json
		Level  string `yaml:"level"`  // debug, info (default), warn, error
	} `yaml:"log"`

	domain spiffeid.TrustDomain
}

// ReadConfig reads a configuration, fills in the defaults and checks it. Errors
// name the file and the line.
func ReadConfig(file string, r io.Reader) (*Config, error) { return nil, nil }

// Domain is the parsed TrustDomain.
func (c *Config) Domain() spiffeid.TrustDomain { return c.domain }
