// Package manifest reads and writes the YAML files in which people declare the objects of
// the catalogue. What can be seen in one object is checked here; whether the objects fit
// together is for [catalog.Compile].
package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/nearest"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// APIVersion stands in every document.
const APIVersion = "entente/v1"

// document is what every object looks like in a file.
type document[S any] struct {
	yamlfile.Pos
	APIVersion string   `yaml:"apiVersion,required"`
	Kind       string   `yaml:"kind,required"`
	Metadata   metadata `yaml:"metadata"`
	Spec       S        `yaml:"spec,required"`
}

type metadata struct {
	yamlfile.Pos
	Name  string `yaml:"name"`
	Owner string `yaml:"owner"`
}

type runSpec struct {
	yamlfile.Pos
	User    string   `yaml:"user"`
	UID     *uint32  `yaml:"uid"`
	GID     *uint32  `yaml:"gid"`
	Path    string   `yaml:"path"`
	Groups  []uint32 `yaml:"groups"` // supplementary ones
	SHA256  string   `yaml:"sha256"`
	Cmdline string   `yaml:"cmdline"` // digest of the command line
	Systemd string   `yaml:"systemd"` // unit
	// Container is the id that its runtime gave it.
	Container string   `yaml:"container"`
	Run       string   `yaml:"run"` // what `entente run` registered
	Hosts     []string `yaml:"hosts,required"`
}

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

type healthSpec struct {
	yamlfile.Pos
	HTTP string    `yaml:"http"`
	GRPC *grpcSpec `yaml:"grpc"`
}

type grpcSpec struct {
	Service string `yaml:"service"` // empty: the server as a whole
}

const anyContent = "any"

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

type exportSpec struct {
	To []string `yaml:"to,required"`
}

type ttlSpec struct {
	X509 time.Duration `yaml:"x509,min=1s"`
	JWT  time.Duration `yaml:"jwt,min=1s"`
	WIT  time.Duration `yaml:"wit,min=1s"`

	yamlfile.Pos
}

type gatewaySpec struct {
	yamlfile.Pos
	Run        runSpec `yaml:"run,required"`
	Datacenter string  `yaml:"datacenter,required"`
	Address    string  `yaml:"address,required"`
}

type importSpec struct {
	yamlfile.Pos
	Service  string   `yaml:"service,required"`
	Port     uint16   `yaml:"port,min=1"` // the one that it has in its own domain
	Protocol protocol `yaml:"protocol"`
}

type agreementSpec struct {
	yamlfile.Pos
	Peer     string            `yaml:"peer,required"`
	Expires  expiry            `yaml:"expires,required"`
	Gateways []peerGatewaySpec `yaml:"gateways"`
	Allow    []allowSpec       `yaml:"allow"`
}

type peerGatewaySpec struct {
	yamlfile.Pos
	ID         string `yaml:"id,required"`
	Datacenter string `yaml:"datacenter,required"`
	Address    string `yaml:"address,required"`
}

type allowSpec struct {
	yamlfile.Pos
	Callers   []string   `yaml:"callers,required"`
	Service   string     `yaml:"service,required"`
	HTTP      []httpSpec `yaml:"http"`
	Assurance string     `yaml:"assurance,oneof=attested"` // the only one there is so far
	Rate      string     `yaml:"rate,unsupported"`
	User      string     `yaml:"user,unsupported"`
}

type httpSpec struct {
	yamlfile.Pos
	Methods []string  `yaml:"methods"`
	Path    *pathSpec `yaml:"path"`
}

type pathSpec struct {
	Type  pathType `yaml:"type"`
	Value string   `yaml:"value,required"`
}

type relationshipSpec struct {
	yamlfile.Pos
	Endpoint   *endpointSpec `yaml:"endpoint"`
	BundleFile string        `yaml:"bundleFile"` // beside the YAML file
	Bundle     string        `yaml:"bundle"`     // or in it
	WIT        bool          `yaml:"wit"`        // exchange WIT keys as well
}

type roleBindingSpec struct {
	yamlfile.Pos
	Role     adminRole `yaml:"role,required"`
	Subjects []string  `yaml:"subjects,required"` // SPIFFE paths
	Prefixes []string  `yaml:"prefixes"`          // SPIFFE paths at or below which the role counts; none: everywhere
}

// adminRole is statev1.AdminRole as people write it.
type adminRole statev1.AdminRole

var adminRoles = catalog.Roles()

func (r *adminRole) UnmarshalText(text []byte) error {
	value, ok := adminRoles[string(text)]
	if !ok {
		return notOneOf(string(text), slices.Sorted(maps.Keys(adminRoles)))
	}
	*r = adminRole(value)
	return nil
}

func (r adminRole) MarshalText() ([]byte, error) { return nameOf(adminRoles, statev1.AdminRole(r)) }

type endpointSpec struct {
	URLs []string `yaml:"urls,required"`
	ID   string   `yaml:"id"`
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

// protocol is statev1.Protocol as people write it.
type protocol statev1.Protocol

var protocols = map[string]statev1.Protocol{"http": statev1.Protocol_PROTOCOL_UNSPECIFIED, "tcp": statev1.Protocol_PROTOCOL_TCP}

func (p *protocol) UnmarshalText(text []byte) error {
	value, ok := protocols[string(text)]
	if !ok {
		return notOneOf(string(text), slices.Sorted(maps.Keys(protocols)))
	}
	*p = protocol(value)
	return nil
}

func (p protocol) MarshalText() ([]byte, error) { return nameOf(protocols, statev1.Protocol(p)) }

// pathType is statev1.PathType by the names of the Gateway API.
type pathType statev1.PathType

var pathTypes = map[string]statev1.PathType{"PathPrefix": statev1.PathType_PATH_TYPE_PREFIX, "Exact": statev1.PathType_PATH_TYPE_EXACT}

func (p *pathType) UnmarshalText(text []byte) error {
	value, ok := pathTypes[string(text)]
	if !ok {
		return notOneOf(string(text), slices.Sorted(maps.Keys(pathTypes)))
	}
	*p = pathType(value)
	return nil
}

func (p pathType) MarshalText() ([]byte, error) { return nameOf(pathTypes, statev1.PathType(p)) }

func notOneOf(text string, names []string) error {
	err := fmt.Sprintf("%q is not one of %s", text, strings.Join(names, ", "))
	if near := nearest.Word(text, names); near != "" {
		err += fmt.Sprintf("; did you mean %q?", near)
	}
	return errors.New(err)
}

func nameOf[E ~int32](names map[string]E, value E) ([]byte, error) {
	for name, each := range names {
		if each == value {
			return []byte(name), nil
		}
	}
	return nil, fmt.Errorf("value %d has no name", value)
}

// expiry is a Unix second: a day, which ends with its first moment in UTC, or an
// RFC 3339 instant.
type expiry int64

func (e *expiry) UnmarshalText(text []byte) error {
	at, err := time.Parse(time.DateOnly, string(text))
	if err != nil {
		if at, err = time.Parse(time.RFC3339, string(text)); err != nil || at.Nanosecond() != 0 {
			return fmt.Errorf("%q is neither a day such as 2027-11-20 nor an instant such as 2027-11-20T18:00:00Z", text)
		}
	}
	if at.Unix() <= 0 {
		return fmt.Errorf("%q is before 1970", text)
	}
	*e = expiry(at.Unix())
	return nil
}

func (e expiry) MarshalText() ([]byte, error) {
	at := time.Unix(int64(e), 0).UTC()
	if at.Equal(at.Truncate(24 * time.Hour)) {
		return []byte(at.Format(time.DateOnly)), nil
	}
	return []byte(at.Format(time.RFC3339)), nil
}

// Parse reads the documents of a file of any of [catalog.Kinds], in their order, with
// Source set to FILE:LINE. readFile reads the files that they refer to, whose names
// are taken relative to the file's own folder; nil: such a reference is an error.
//
// Only what can be seen in one object is checked here; the error is a
// yamlfile.Errors with the exact places. Whether the objects fit together is for
// [catalog.Compile], over those of all files.
func Parse(file string, r io.Reader, readFile func(path string) ([]byte, error)) ([]*statev1.Object, error) {
	p := parser{file, readFile}
	var objects []*statev1.Object
	err := yamlfile.DecodeAll(file, r, func(doc yamlfile.Node) error {
		object, err := p.object(doc)
		if err != nil {
			return err
		}
		object.Source = doc.Pos().String()
		objects = append(objects, object)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return objects, nil
}

type parser struct {
	file     string
	readFile func(string) ([]byte, error)
}

func (p *parser) object(doc yamlfile.Node) (*statev1.Object, error) {
	if version, pos, ok := doc.Scalar("apiVersion"); ok && version != APIVersion {
		return nil, pos.Errorf("apiVersion is %q; this release reads %q", version, APIVersion)
	}
	kind, pos, ok := doc.Scalar("kind")
	if !ok {
		return nil, doc.Pos().Errorf("the document has no kind; it is one of %s", strings.Join(catalog.Kinds(), ", "))
	}
	doc = doc.Named(kind)
	switch kind {
	case "Service":
		return parse(doc, p.service)
	case "Gateway":
		return parse(doc, p.gateway)
	case "Import":
		return parse(doc, p.imported)
	case "Agreement":
		return parse(doc, p.agreement)
	case "Relationship":
		return parse(doc, p.relationship)
	case "RoleBinding":
		return parse(doc, p.roleBinding)
	default:
		return nil, pos.Errorf("kind: %v", notOneOf(kind, catalog.Kinds()))
	}
}

// parse decodes one document and hands it to the kind's own conversion. Every kind
// but Import is named by its metadata.
func parse[S any](doc yamlfile.Node, convert func(*document[S], *statev1.Object) error) (*statev1.Object, error) {
	var d document[S]
	if err := doc.Decode(&d); err != nil {
		return nil, err
	}
	if d.Metadata.Name == "" && d.Kind != "Import" {
		return nil, d.At("metadata").Errorf("%s has no metadata.name", d.Kind)
	}
	object := &statev1.Object{Owner: d.Metadata.Owner}
	if err := convert(&d, object); err != nil {
		return nil, err
	}
	return object, nil
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

// selectors in a fixed order, so that the same file gives the same record.
func (r *runSpec) selectors() ([]string, error) {
	var list []string
	add := func(kind, value string) {
		if value != "" {
			list = append(list, kind+":"+value)
		}
	}
	number := func(n *uint32) string {
		if n == nil {
			return ""
		}
		return strconv.FormatUint(uint64(*n), 10)
	}
	add("systemd:unit", r.Systemd)
	add("container:id", r.Container)
	add("unix:user", r.User)
	add("unix:uid", number(r.UID))
	add("unix:gid", number(r.GID))
	for _, group := range r.Groups {
		add("unix:group", number(&group))
	}
	add("unix:path", r.Path)
	add("unix:sha256", r.SHA256)
	add("unix:cmdline", r.Cmdline)
	add("run:id", r.Run)
	identified := r.User != "" || r.UID != nil || r.SHA256 != "" || r.Systemd != "" || r.Container != ""
	switch {
	case len(list) == 0:
		return nil, r.Errorf("run says nothing by which the process is recognised; add systemd, user or uid")
	case !identified && r.Path != "":
		return nil, r.At("path").Errorf("run.path stands alone: any user may start a program from a path; add systemd, container, user or uid")
	case !identified && r.Cmdline != "":
		return nil, r.At("cmdline").Errorf("run.cmdline stands alone: a command line is what a process says of itself; add systemd, container, user or uid")
	case !identified && r.GID != nil:
		return nil, r.At("gid").Errorf("run.gid stands alone; add user or uid beside it")
	case !identified:
		return nil, r.Errorf("run says nothing that identifies a process; add systemd, user or uid")
	}
	return list, nil
}

func (p *parser) gateway(d *document[gatewaySpec], object *statev1.Object) error {
	selectors, err := d.Spec.Run.selectors()
	if err != nil {
		return err
	}
	object.Kind = &statev1.Object_Gateway{Gateway: &statev1.Gateway{
		Name:       d.Metadata.Name,
		Datacenter: d.Spec.Datacenter,
		Address:    d.Spec.Address,
		Hosts:      d.Spec.Run.Hosts,
		Selectors:  selectors,
	}}
	return nil
}

func (p *parser) imported(d *document[importSpec], object *statev1.Object) error {
	if d.Metadata.Name != "" && d.Metadata.Name != d.Spec.Service {
		return d.Metadata.At("name").Errorf("an Import is named by its service; leave metadata.name out")
	}
	object.Kind = &statev1.Object_Import{Import: &statev1.Import{
		Service: d.Spec.Service, Port: uint32(d.Spec.Port), Protocol: statev1.Protocol(d.Spec.Protocol),
	}}
	return nil
}

func (p *parser) agreement(d *document[agreementSpec], object *statev1.Object) error {
	s := &d.Spec
	peer, err := spiffeid.TrustDomainFromString(s.Peer)
	if err != nil {
		return s.At("peer").Errorf("peer %q is not a trust domain name, as in trading.example", s.Peer)
	}
	agreement := &statev1.Agreement{Name: d.Metadata.Name, Peer: peer.Name(), Expires: int64(s.Expires)}
	for _, g := range s.Gateways {
		id, err := spiffeid.FromString(g.ID)
		switch {
		case err != nil:
			return g.At("id").Errorf("gateway id %q is not a SPIFFE ID: %v", g.ID, err)
		case !id.MemberOf(peer):
			return g.At("id").Errorf("gateway id %q is not in trust domain %s, the agreement's peer", g.ID, peer)
		case id.Path() == "":
			return g.At("id").Errorf("gateway id %q names the whole trust domain; only exact gateways are listed", g.ID)
		}
		agreement.Gateways = append(agreement.Gateways, &statev1.PeerGateway{Path: id.Path(), Datacenter: g.Datacenter, Address: g.Address})
	}
	for _, a := range s.Allow {
		for _, caller := range a.Callers {
			if _, err := federation.ParsePattern(caller); err != nil {
				return a.At("callers").Errorf("callers: %v", err)
			}
		}
		allow := &statev1.Allow{Callers: a.Callers, Service: a.Service}
		for _, h := range a.HTTP {
			if len(h.Methods) == 0 && h.Path == nil {
				return h.Errorf("an http rule without methods and path allows everything; leave http out if that is meant")
			}
			match := &statev1.HTTPMatch{Methods: h.Methods}
			if h.Path != nil {
				match.Path, match.PathType = h.Path.Value, statev1.PathType(h.Path.Type)
			}
			allow.Http = append(allow.Http, match)
		}
		if a.Given("http") && len(a.HTTP) == 0 {
			return a.At("http").Errorf("http is empty; list what is allowed, or leave it out to allow every method and path")
		}
		agreement.Allow = append(agreement.Allow, allow)
	}
	object.Kind = &statev1.Object_Agreement{Agreement: agreement}
	return nil
}

func (p *parser) relationship(d *document[relationshipSpec], object *statev1.Object) error {
	s := &d.Spec
	relationship := &statev1.Relationship{TrustDomain: d.Metadata.Name, Wit: s.WIT}
	if s.Endpoint != nil {
		relationship.EndpointUrls, relationship.EndpointId = s.Endpoint.URLs, s.Endpoint.ID
	}
	switch {
	case s.Bundle != "" && s.BundleFile != "":
		return s.At("bundle").Errorf("bundle and bundleFile are both given; keep one")
	case s.Bundle != "":
		relationship.BootstrapBundle = []byte(s.Bundle)
	case s.BundleFile != "":
		data, err := p.read(s.BundleFile)
		if err != nil {
			return s.At("bundleFile").Errorf("bundleFile: %v", err)
		}
		relationship.BootstrapBundle = data
	case relationship.EndpointId != "":
		return s.Errorf("endpoint.id is given without a bundle to verify it with; add bundleFile")
	}
	object.Kind = &statev1.Object_Relationship{Relationship: relationship}
	return nil
}

func (p *parser) roleBinding(d *document[roleBindingSpec], object *statev1.Object) error {
	object.Kind = &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{
		Name: d.Metadata.Name, Role: statev1.AdminRole(d.Spec.Role), Subjects: d.Spec.Subjects, Prefixes: d.Spec.Prefixes,
	}}
	return nil
}

// maxBundle bounds a bootstrap bundle: it travels in one entry of the log.
const maxBundle = 48 << 10

func (p *parser) read(name string) ([]byte, error) {
	if p.readFile == nil {
		return nil, errors.New("files cannot be read here; write the bundle itself as bundle: |")
	}
	if !path.IsAbs(name) {
		name = path.Join(path.Dir(p.file), name)
	}
	data, err := p.readFile(name)
	switch {
	case err != nil:
		return nil, err
	case len(bytes.TrimSpace(data)) == 0:
		return nil, fmt.Errorf("%s is empty", name)
	case len(data) > maxBundle:
		return nil, fmt.Errorf("%s is larger than %d KiB, which no bundle needs to be", name, maxBundle>>10)
	}
	return data, nil
}

// Format writes objects as the documents that Parse reads back: the same
// objects, save for Source and Revision. It fails for an object that no file can
// say, such as one of a kind this release does not know.
func Format(objects ...*statev1.Object) ([]byte, error) {
	var b bytes.Buffer
	for i, object := range objects {
		doc, err := format(object)
		if err != nil {
			return nil, fmt.Errorf("write %s as YAML: %w", catalog.Key(object), err)
		}
		if i > 0 {
			b.WriteString("---\n")
		}
		b.Write(doc)
	}
	return b.Bytes(), nil
}

func format(object *statev1.Object) ([]byte, error) {
	kind, name := catalog.KindName(object)
	switch {
	case object.GetService() != nil:
		spec, err := formatService(object.GetService())
		return marshal(kind, name, object, spec, err)
	case object.GetGateway() != nil:
		spec, err := formatGateway(object.GetGateway())
		return marshal(kind, name, object, spec, err)
	case object.GetImport() != nil:
		i := object.GetImport()
		if i.GetPort() > math.MaxUint16 {
			return nil, errors.New("its port is over 65535")
		}
		return marshal(kind, "", object, importSpec{Service: name, Port: uint16(i.GetPort()), Protocol: protocol(i.GetProtocol())}, nil)
	case object.GetAgreement() != nil:
		spec, err := formatAgreement(object.GetAgreement())
		return marshal(kind, name, object, spec, err)
	case object.GetRelationship() != nil:
		r := object.GetRelationship()
		spec := relationshipSpec{Bundle: string(r.GetBootstrapBundle()), WIT: r.GetWit()}
		if len(r.GetEndpointUrls()) > 0 {
			spec.Endpoint = &endpointSpec{r.GetEndpointUrls(), r.GetEndpointId()}
		} else if r.GetEndpointId() != "" {
			return nil, errors.New("it has an endpoint ID and no URL")
		}
		return marshal(kind, name, object, spec, nil)
	case object.GetRoleBinding() != nil:
		b := object.GetRoleBinding()
		return marshal(kind, name, object, roleBindingSpec{Role: adminRole(b.GetRole()), Subjects: b.GetSubjects(), Prefixes: b.GetPrefixes()}, nil)
	default:
		return nil, errors.New("the object is of no known kind")
	}
}

func marshal[S any](kind, name string, object *statev1.Object, spec S, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return yamlfile.Marshal(document[S]{
		APIVersion: APIVersion,
		Kind:       kind,
		Metadata:   metadata{Name: name, Owner: object.GetOwner()},
		Spec:       spec,
	})
}

func formatService(s *statev1.Service) (serviceSpec, error) {
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

func formatGateway(g *statev1.Gateway) (gatewaySpec, error) {
	run, err := formatRun(g.GetHosts(), g.GetSelectors())
	return gatewaySpec{Run: run, Datacenter: g.GetDatacenter(), Address: g.GetAddress()}, err
}

func formatRun(hosts, selectors []string) (runSpec, error) {
	run := runSpec{Hosts: hosts}
	for _, selector := range selectors {
		kind, value := catalog.CutSelector(selector)
		switch kind {
		case "systemd:unit":
			run.Systemd = value
		case "container:id":
			run.Container = value
		case "unix:user":
			run.User = value
		case "unix:uid", "unix:gid", "unix:group":
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil {
				return run, fmt.Errorf("selector %q: %w", selector, err)
			}
			id := uint32(n)
			switch kind {
			case "unix:uid":
				run.UID = &id
			case "unix:gid":
				run.GID = &id
			default:
				run.Groups = append(run.Groups, id)
			}
		case "unix:path":
			run.Path = value
		case "unix:sha256":
			run.SHA256 = value
		case "unix:cmdline":
			run.Cmdline = value
		case "run:id":
			run.Run = value
		}
	}
	if again, err := run.selectors(); err != nil || !slices.Equal(again, selectors) {
		return run, fmt.Errorf("selectors %q cannot be said in a file", selectors)
	}
	return run, nil
}

func formatAgreement(a *statev1.Agreement) (agreementSpec, error) {
	spec := agreementSpec{Peer: a.GetPeer(), Expires: expiry(a.GetExpires())}
	for _, g := range a.GetGateways() {
		spec.Gateways = append(spec.Gateways, peerGatewaySpec{
			ID: "spiffe://" + a.GetPeer() + g.GetPath(), Datacenter: g.GetDatacenter(), Address: g.GetAddress(),
		})
	}
	for _, allow := range a.GetAllow() {
		out := allowSpec{Callers: allow.GetCallers(), Service: allow.GetService()}
		for _, m := range allow.GetHttp() {
			h := httpSpec{Methods: m.GetMethods()}
			switch {
			case m.GetPath() != "":
				h.Path = &pathSpec{pathType(m.GetPathType()), m.GetPath()}
			case m.GetPathType() != statev1.PathType_PATH_TYPE_UNSPECIFIED || len(m.GetMethods()) == 0:
				return spec, errors.New("an http rule without a path has a path type, or allows everything")
			}
			out.HTTP = append(out.HTTP, h)
		}
		spec.Allow = append(spec.Allow, out)
	}
	return spec, nil
}
