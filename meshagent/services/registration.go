// Package services holds what a host says of the services that run on it: where they
// listen, how their health is found out, whether they are drained.
//
// It says nothing of who they are. A registration counts only for a service that the
// domain's catalogue places on this host; the agent sees to that. DESIGN.md of meshagent
// tells the whole.
package services

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Registration is what a host says of one service. What it leaves out stays as the
// catalogue and the agent's file have it.
type Registration struct {
	yamlfile.Pos
	// Service is NAME of the Service. Required.
	Service string `yaml:"service,required"`
	// Port at which it listens on this host; sidecar.portOffset is not added. Default: the
	// catalogue's.
	Port uint16 `yaml:"port,min=1"`
	// Address is the loopback address at which it listens. Default sidecar.appAddress.
	Address string `yaml:"address"`
	// Socket is the absolute path of the unix socket at which it listens, in the place of
	// address and port: no other program can take it while the service is down, if it
	// lies in a directory that only the service's user and root can change.
	Socket string `yaml:"socket"`
	// Health says how it is checked.
	Health *Health `yaml:"health"`
	// Drain is how long requests under way may take when it is drained, at most 1h.
	// Default 10s.
	Drain time.Duration `yaml:"drain,min=1ms,max=1h"`
}

// Health is how a service is checked. Of http, tcp, grpc and command at most one is
// given; none: as the catalogue says.
type Health struct {
	yamlfile.Pos
	// HTTP is the path of a GET; 2xx is good.
	HTTP string `yaml:"http"`
	// TCP: a connection that is accepted is good.
	TCP bool `yaml:"tcp"`
	// GRPC asks by gRPC's health protocol.
	GRPC *GRPC `yaml:"grpc"`
	// Command is a program, by its absolute path, with its arguments; no shell. Exit code 0
	// is good. It runs as the agent does.
	Command []string `yaml:"command"`
	// Port of http, tcp and grpc. Default: the service's.
	Port uint16 `yaml:"port,min=1"`

	Thresholds

	// Initial is what it counts as until the first check has ended. Default unhealthy.
	Initial string `yaml:"initial,oneof=healthy|unhealthy"`
}

// GRPC is a check by grpc.health.v1.
type GRPC struct {
	// Service that is asked for. Empty: the server as a whole.
	Service string `yaml:"service"`
}

// Thresholds say how often is checked, and what follows.
type Thresholds struct {
	// Interval between two checks, 100ms to 1h. Default 1s.
	Interval time.Duration `yaml:"interval,min=100ms,max=1h"`
	// Timeout of one check, 10ms to 1m. Default 1s.
	Timeout time.Duration `yaml:"timeout,min=10ms,max=1m"`
	// HealthyThreshold is how many good checks in a row bring back what was healthy
	// before; the first good one of all is enough. Default 2.
	HealthyThreshold int `yaml:"healthyThreshold,min=1,max=100"`
	// UnhealthyThreshold is how many bad checks in a row make it unhealthy. Default 1.
	UnhealthyThreshold int `yaml:"unhealthyThreshold,min=1,max=100"`
	// OutlierDetection judges by the requests that the sidecar hands over.
	OutlierDetection OutlierDetection `yaml:"outlierDetection"`
}

// OutlierDetection is passive health, in Envoy's words.
type OutlierDetection struct {
	// ConsecutiveLocalOriginFailure is how many requests in a row that get no answer
	// (nobody listens, somebody else listens, the connection breaks off) make the instance
	// unhealthy until its checks are good again. 0: never. Default 5.
	ConsecutiveLocalOriginFailure *int `yaml:"consecutiveLocalOriginFailure,min=0,max=10000"`
	// Consecutive5xx is how many answers of 5xx in a row do. 0, the default: never, since
	// a caller may be their cause.
	Consecutive5xx *int `yaml:"consecutive5xx,min=0,max=10000"`
	// BaseEjectionTime is how long an instance that was ejected for 5xx stays unhealthy at
	// least, times how often in a row that was; at most MaxEjectionTime. Default 30s and 5m.
	BaseEjectionTime time.Duration `yaml:"baseEjectionTime,min=1ms,max=1h"`
	MaxEjectionTime  time.Duration `yaml:"maxEjectionTime,min=1ms,max=24h"`
}

// Defaults are those of an agent whose file says nothing.
func Defaults() Thresholds {
	local, fives := 5, 0
	return Thresholds{Interval: time.Second, Timeout: time.Second, HealthyThreshold: 2, UnhealthyThreshold: 1,
		OutlierDetection: OutlierDetection{&local, &fives, 30 * time.Second, 5 * time.Minute}}
}

// or fills in what t leaves out.
func (t Thresholds) or(defaults Thresholds) Thresholds {
	o, d := t.OutlierDetection, defaults.OutlierDetection
	return Thresholds{
		cmp.Or(t.Interval, defaults.Interval),
		cmp.Or(t.Timeout, defaults.Timeout),
		cmp.Or(t.HealthyThreshold, defaults.HealthyThreshold),
		cmp.Or(t.UnhealthyThreshold, defaults.UnhealthyThreshold),
		OutlierDetection{
			cmp.Or(o.ConsecutiveLocalOriginFailure, d.ConsecutiveLocalOriginFailure),
			cmp.Or(o.Consecutive5xx, d.Consecutive5xx),
			cmp.Or(o.BaseEjectionTime, d.BaseEjectionTime),
			cmp.Or(o.MaxEjectionTime, d.MaxEjectionTime),
		},
	}
}

// maxSocketPath is what Linux and Darwin can connect to.
const maxSocketPath = 103

// MaxServices is how many services one host may register.
const MaxServices = 1000

// file is a drop-in file, and the part of the agent's file that is like one.
type file struct {
	yamlfile.Pos
	Services []Registration `yaml:"services,required"`
}

// Read reads registrations as they stand in a drop-in file. Errors name file and line.
func Read(name string, r io.Reader) ([]Registration, error) {
	var f file
	if err := yamlfile.Decode(name, r, &f); err != nil {
		return nil, err
	}
	if errs := Inspect(f.Services); len(errs) > 0 {
		return nil, errs
	}
	return f.Services, nil
}

// Write writes what Read reads.
func Write(registrations []Registration) ([]byte, error) {
	return yamlfile.Marshal(file{Services: registrations})
}

// Inspect looks at what single values cannot show.
func Inspect(registrations []Registration) (errs yamlfile.Errors) {
	if len(registrations) > MaxServices {
		return yamlfile.Errors{registrations[MaxServices].Errorf("a host registers at most %d services", MaxServices)}
	}
	first := map[string]yamlfile.Pos{}
	for i := range registrations {
		r := &registrations[i]
		if err := ca.CheckLabel(r.Service); err != nil {
			errs = append(errs, r.At("service").Errorf("%v", err))
		}
		if at, twice := first[r.Service]; twice {
			errs = append(errs, r.At("service").Errorf("service %s is registered twice, first at line %d", r.Service, at.Line))
		}
		first[r.Service] = r.Pos
		if ip, err := netip.ParseAddr(r.Address); r.Address != "" && (err != nil || !ip.IsLoopback() || ip.Zone() != "") {
			errs = append(errs, r.At("address").Errorf("%q is not a loopback address: traffic to the application may not leave the host unprotected", r.Address))
		}
		switch {
		case r.Socket == "":
		case !filepath.IsAbs(r.Socket) || filepath.Clean(r.Socket) != r.Socket || strings.ContainsRune(r.Socket, 0) || len(r.Socket) > maxSocketPath:
			errs = append(errs, r.At("socket").Errorf("%.200q is not an absolute path in its shortest form of at most %d bytes", r.Socket, maxSocketPath))
		case r.Port != 0 || r.Address != "":
			errs = append(errs, r.At("socket").Errorf("socket is given, and so is port or address: give one of them"))
		}
		if r.Health != nil {
			errs = append(errs, r.Health.check()...)
		}
	}
	return errs
}

func (h *Health) check() (errs yamlfile.Errors) {
	var kinds []string
	for name, given := range map[string]bool{"http": h.HTTP != "", "tcp": h.TCP, "grpc": h.GRPC != nil, "command": h.Given("command") || len(h.Command) > 0} {
		if given {
			kinds = append(kinds, name)
		}
	}
	slices.Sort(kinds)
	if len(kinds) > 1 {
		errs = append(errs, h.At(kinds[1]).Errorf("%s are given: give one of them", strings.Join(kinds, " and ")))
	}
	if h.HTTP != "" && !strings.HasPrefix(h.HTTP, "/") || strings.ContainsFunc(h.HTTP, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '#' }) {
		errs = append(errs, h.At("http").Errorf("%q is not a path, as /healthz is", h.HTTP))
	}
	if slices.Contains(kinds, "command") {
		if err := CheckCommand(h.Command); err != nil {
			errs = append(errs, h.At("command").Errorf("%v", err))
		}
	}
	if h.Port != 0 && (len(kinds) == 0 || kinds[0] == "command") {
		errs = append(errs, h.At("port").Errorf("a port belongs to http, tcp or grpc: say which"))
	}
	return errs
}

// CheckCommand refuses a command that does not say which program it is.
func CheckCommand(command []string) error {
	if len(command) == 0 || !filepath.IsAbs(command[0]) {
		return fmt.Errorf("give the absolute path of a program, and its arguments")
	}
	if slices.ContainsFunc(command, func(s string) bool { return strings.ContainsRune(s, 0) }) {
		return fmt.Errorf("an argument of a command holds a zero byte")
	}
	return nil
}
