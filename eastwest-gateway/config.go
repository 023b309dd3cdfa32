package gateway

import (
	"fmt"
	"io"
	"net"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Config is gateway.yaml.
type Config struct {
	TrustDomain string           `yaml:"trustDomain,required"`
	Name        string           `yaml:"name,required"`       // of the Gateway object: its SPIFFE path is /entente/gateway/NAME
	Datacenter  string           `yaml:"datacenter,required"` // where it stands
	WorkloadAPI WorkloadAPI      `yaml:"workloadAPI,required"`
	CA          CA               `yaml:"ca,required"`
	EastWest    *EastWest        `yaml:"eastWest"` // absent: no east-west door
	Edge        yamlfile.Node    `yaml:"edge"`     // of eastwest-gateway/edge; absent: no edge
	Admin       Admin            `yaml:"admin"`
	DataDir     string           `yaml:"dataDir"` // where it keeps whom it believes as a CA node; empty: nowhere
	AccessLog   daemon.AccessLog `yaml:"accessLog"`
	Log         Log              `yaml:"log"`
}

// WorkloadAPI is where the gateway gets its SVIDs and bundles.
type WorkloadAPI struct {
	Socket string `yaml:"socket,required"` // path, or unix:///path
}

// CA is where it is told the catalogue and the endpoints.
type CA struct {
	Addresses []string `yaml:"addresses,required"` // host:port of CA nodes' API; more are learned
	// RecoveryKey is the public half of the cluster's recovery key; empty: that of the
	// first cluster record is kept in dataDir.
	RecoveryKey string `yaml:"recoveryKey"`
}

// EastWest is the mTLS door.
type EastWest struct {
	Listen string `yaml:"listen,required"` // host:port
}

// Admin is where the gateway is looked after.
type Admin struct {
	Listen string `yaml:"listen"` // host:port of /healthz, /readyz and /metrics; empty: none
	// Socket is the path of the unix socket of DataPlane, mode 0600: the gateway's user and
	// root may do everything there. Default: admin.sock in dataDir; without that, none.
	Socket string `yaml:"socket"`
}

// Log is the process log.
type Log struct {
	Format string `yaml:"format,oneof=text|json"`
	Level  string `yaml:"level,oneof=debug|info|warn|error"`
}

// ReadConfig reads gateway.yaml. file is its name in complaints.
func ReadConfig(file string, r io.Reader) (Config, error) {
	var c Config
	if err := yamlfile.Decode(file, r, &c); err != nil {
		return Config{}, err
	}
	if err := c.check(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// adminSocket is the file of the admin socket in dataDir.
const adminSocket = "admin.sock"

func (c *Config) check() error {
	if c.Admin.Socket == "" && c.DataDir != "" {
		c.Admin.Socket = filepath.Join(c.DataDir, adminSocket)
	}
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return fmt.Errorf("trustDomain %q: %w", c.TrustDomain, err)
	}
	if _, err := spiffeid.FromSegments(td, "entente", "gateway", c.Name); err != nil {
		return fmt.Errorf("name %q: %w", c.Name, err)
	}
	if c.EastWest == nil && c.Edge.IsZero() {
		return fmt.Errorf("neither eastWest nor edge is given: the gateway would have nothing to do")
	}
	if c.CA.RecoveryKey != "" {
		if _, err := client.ParseRecoveryKey(c.CA.RecoveryKey); err != nil {
			return fmt.Errorf("ca.recoveryKey: %w", err)
		}
	}
	if len(c.CA.Addresses) == 0 {
		return fmt.Errorf("ca.addresses is empty: give the API address of at least one CA node")
	}
	addresses := map[string]string{}
	for _, a := range c.CA.Addresses {
		addresses["ca.addresses: "+a] = a
	}
	if c.EastWest != nil {
		addresses["eastWest.listen"] = c.EastWest.Listen
	}
	if c.Admin.Listen != "" {
		addresses["admin.listen"] = c.Admin.Listen
	}
	for key, address := range addresses {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return fmt.Errorf("%s: %w: write host:port", key, err)
		}
	}
	return c.AccessLog.Complete()
}
