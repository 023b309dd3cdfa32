package manifest

import (
	"errors"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

type serviceSpec struct {
	yamlfile.Pos
	Run      runSpec       `yaml:"run,required"`
	Path     string        `yaml:"path"` // SPIFFE path; default: "/" and the name
	Port     uint16        `yaml:"port,min=1"`
	Protocol protocol      `yaml:"protocol"`
	HTTP     *contentSpec  `yaml:"http"`
	Health   *healthSpec   `yaml:"health"`
	Inbound  string        `yaml:"inbound,oneof=strict"` // the only way there is so far
	Outbound *outboundSpec `yaml:"outbound"`
	Failover *failoverSpec `yaml:"failover"`
	Export   *exportSpec   `yaml:"export"`
	Calls    []string      `yaml:"calls"`
	TTL      *ttlSpec      `yaml:"ttl"`
	Hint     string        `yaml:"hint"` // told to the workload with its SVIDs
	Edge     bool          `yaml:"edge"` // the identity of an edge
}

// contentSpec says what the application does with the content of requests.
type contentSpec struct {
	Content     string `yaml:"content,oneof=any"` // absent: none on GET, HEAD, OPTIONS, DELETE and TRACE
	ReadsBodies bool   `yaml:"readsBodies"`
}

const anyContent = "any"

type healthSpec struct {
	yamlfile.Pos
	HTTP string    `yaml:"http"`
	GRPC *grpcSpec `yaml:"grpc"`
}

type grpcSpec struct {
	Service string `yaml:"service"` // empty: the server as a whole
}

type outboundSpec struct {
	Port uint16 `yaml:"port,required,min=1"`
}

type failoverSpec struct {
	Mode     mode          `yaml:"mode"`
	Order    []string      `yaml:"order"`
	Failback mode          `yaml:"failback"`
	Hold     time.Duration `yaml:"hold,min=1s,max=24h"`

	yamlfile.Pos
}

// mode is statev1.Mode as people write it.
type mode statev1.Mode

var modes = map[string]statev1.Mode{"auto": statev1.Mode_MODE_AUTO, "manual": statev1.Mode_MODE_MANUAL}

func (m *mode) UnmarshalText(text []byte) error {
	value, ok := modes[string(text)]
	if !ok {
		return notOneOf(string(text), slices.Sorted(maps.Keys(modes)))
	}
	*m = mode(value)
	return nil
}

func (m mode) MarshalText() ([]byte, error) { return nameOf(modes, statev1.Mode(m)) }

type exportSpec struct {
	To []string `yaml:"to,required"`
}

type ttlSpec struct {
	X509 time.Duration `yaml:"x509,min=1s"`
	JWT  time.Duration `yaml:"jwt,min=1s"`
	WIT  time.Duration `yaml:"wit,min=1s"`

	yamlfile.Pos
}

func (p *parser) service(d *document[serviceSpec], object *statev1.Object) error {
	s := &d.Spec
	selectors, err := s.Run.selectors()
	if err != nil {
		return err
	}
	service := &statev1.Service{
		Name:      d.Metadata.Name,
		Path:      "/" + d.Metadata.Name,
		Hosts:     s.Run.Hosts,
		Selectors: selectors,
		Port:      uint32(s.Port),
		Protocol:  statev1.Protocol(s.Protocol),
		Calls:     s.Calls,
		Edge:      s.Edge,
	}
	if s.Path != "" {
		service.Path = s.Path
	}
	if h := s.HTTP; h != nil && (h.Content != "" || h.ReadsBodies) {
		service.Http = &statev1.ServiceHTTP{AnyContent: h.Content == anyContent, ReadsBodies: h.ReadsBodies}
	}
	if s.Health != nil {
		if s.Health.HTTP != "" && s.Health.GRPC != nil || s.Health.HTTP == "" && s.Health.GRPC == nil {
			return s.Health.Errorf("health is either http: /path or grpc: {service: NAME}; leave it out for a TCP connection")
		}
		if strings.HasPrefix(s.Health.HTTP, catalog.GRPCHealth) {
			return s.Health.At("http").Errorf("health.http %q is not a path: it begins with /", s.Health.HTTP)
		}
		if service.HealthPath = s.Health.HTTP; s.Health.GRPC != nil {
			service.HealthPath = catalog.GRPCHealth + s.Health.GRPC.Service
		}
	}
	if s.Outbound != nil {
		service.OutboundPort = uint32(s.Outbound.Port)
	}
	if f := s.Failover; f != nil {
		hold, err := wholeSeconds(f.At("hold"), "failover.hold", f.Hold)
		if err != nil {
			return err
		}
		service.Failover = &statev1.Failover{Mode: statev1.Mode(f.Mode), Order: f.Order, Failback: statev1.Mode(f.Failback), HoldSeconds: hold}
	}
	if s.Export != nil {
		service.ExportTo = s.Export.To
	}
	if ttl := s.TTL; ttl != nil {
		for _, one := range []struct {
			key  string
			d    time.Duration
			into *uint32
		}{{"x509", ttl.X509, &service.X509SvidSeconds}, {"jwt", ttl.JWT, &service.JwtSvidSeconds}, {"wit", ttl.WIT, &service.WitSvidSeconds}} {
			if *one.into, err = wholeSeconds(ttl.At(one.key), "ttl."+one.key, one.d); err != nil {
				return err
			}
		}
	}
	service.Hint = s.Hint
	object.Kind = &statev1.Object_Service{Service: service}
	return nil
}

func wholeSeconds(at yamlfile.Pos, what string, d time.Duration) (uint32, error) {
	if d%time.Second != 0 || d/time.Second > math.MaxUint32 {
		return 0, at.Errorf("%s must be whole seconds", what)
	}
	return uint32(d / time.Second), nil
}

func formatService(o *statev1.Object) (serviceSpec, error) {
	s := o.GetService()
	run, err := formatRun(s.GetHosts(), s.GetSelectors())
	if err != nil {
		return serviceSpec{}, err
	}
	if s.GetPort() > math.MaxUint16 || s.GetOutboundPort() > math.MaxUint16 {
		return serviceSpec{}, errors.New("a port is over 65535")
	}
	spec := serviceSpec{Run: run, Port: uint16(s.GetPort()), Protocol: protocol(s.GetProtocol()), Calls: s.GetCalls(), Edge: s.GetEdge()}
	if s.GetPath() != "/"+s.GetName() {
		spec.Path = s.GetPath()
	}
	if h := s.GetHttp(); h.GetAnyContent() || h.GetReadsBodies() {
		spec.HTTP = &contentSpec{ReadsBodies: h.GetReadsBodies()}
		if h.GetAnyContent() {
			spec.HTTP.Content = anyContent
		}
	}
	if s.GetHealthPath() != "" {
		spec.Health = &healthSpec{HTTP: s.GetHealthPath()}
		if name, ok := strings.CutPrefix(s.GetHealthPath(), catalog.GRPCHealth); ok {
			spec.Health = &healthSpec{GRPC: &grpcSpec{name}}
		}
	}
	if s.GetOutboundPort() != 0 {
		spec.Outbound = &outboundSpec{uint16(s.GetOutboundPort())}
	}
	if f := s.GetFailover(); f != nil {
		spec.Failover = &failoverSpec{
			Mode:     mode(f.GetMode()),
			Order:    f.GetOrder(),
			Failback: mode(f.GetFailback()),
			Hold:     time.Duration(f.GetHoldSeconds()) * time.Second,
		}
	}
	if len(s.GetExportTo()) > 0 {
		spec.Export = &exportSpec{s.GetExportTo()}
	}
	spec.Hint = s.GetHint()
	if s.GetX509SvidSeconds() != 0 || s.GetJwtSvidSeconds() != 0 || s.GetWitSvidSeconds() != 0 {
		spec.TTL = &ttlSpec{
			X509: time.Duration(s.GetX509SvidSeconds()) * time.Second,
			JWT:  time.Duration(s.GetJwtSvidSeconds()) * time.Second,
			WIT:  time.Duration(s.GetWitSvidSeconds()) * time.Second,
		}
	}
	return spec, nil
}
