package manifest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

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

func formatAgreement(o *statev1.Object) (agreementSpec, error) {
	a := o.GetAgreement()
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
