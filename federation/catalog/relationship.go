package catalog

import (
	"encoding/json"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

var relationshipKind = kind{
	name: "Relationship",
	id: func(o *statev1.Object) (string, bool) {
		r := o.GetRelationship()
		return r.GetTrustDomain(), r != nil
	},
	compile: (*compiler).relationship,
	level: func(o *statev1.Object) uint32 {
		// Releases before refuse a URL with a query.
		if slices.ContainsFunc(o.GetRelationship().GetEndpointUrls(), func(url string) bool { return strings.Contains(url, "?") }) {
			return 6
		}
		return 1
	},
	// Hosts learn that a relationship exists and whether WIT keys are exchanged in it. Where
	// the peer's bundle comes from is for the CA, and its bootstrap bundle would hand foreign
	// X.509 roots to everybody (I6).
	forHosts: func(o *statev1.Object) *statev1.Object {
		r := o.GetRelationship()
		return &statev1.Object{
			Kind:     &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: r.GetTrustDomain(), Wit: r.GetWit()}},
			Owner:    o.GetOwner(),
			Revision: o.GetRevision(),
			Source:   o.GetSource(),
		}
	},
	ends: (*Tables).relationshipEnds,
}

func (c *compiler) relationship() {
	r := c.object.GetRelationship()
	td, ok := c.domain("metadata.name", r.GetTrustDomain())
	for _, raw := range r.GetEndpointUrls() {
		u, err := url.Parse(raw)
		switch {
		case err != nil || u.Scheme != "https" || u.Hostname() == "":
			c.fail("write it as https://host:port/path", "endpoint URL %q is not an https URL", raw)
			continue
		case u.User != nil || u.Fragment != "":
			c.fail("", "endpoint URL %q has user information or a fragment", raw)
			continue
		}
		if port := u.Port(); port != "" {
			if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
				c.fail("", "endpoint URL %q: the port is outside 1 to 65535", raw)
			}
		}
		c.foreignHost("endpoint URL", u.Hostname())
	}
	if endpoint := r.GetEndpointId(); endpoint != "" {
		id, err := spiffeid.FromString(endpoint)
		switch {
		case err != nil:
			c.fail("", "endpoint.id %q is not a SPIFFE ID: %v", endpoint, err)
		case ok && !id.MemberOf(td):
			c.fail("", "endpoint.id %q is not in trust domain %s", endpoint, td)
		case id.Path() == "":
			c.fail("", "endpoint.id %q has no path", endpoint)
		case len(r.GetBootstrapBundle()) == 0:
			c.fail("give bundleFile the peer's bundle, obtained over a channel that you trust", "endpoint.id is set and there is no bundle to verify it with")
		}
	}
	if bundle := r.GetBootstrapBundle(); len(bundle) > 0 && !json.Valid(bundle) {
		c.fail("", "the bundle is not JSON")
	}
	if len(r.GetEndpointUrls()) == 0 {
		c.warn("add endpoint.urls", "no endpoint URL is given: the peer's key rotations will not be noticed")
	}
	if ok {
		c.peer(td.Name()).related = true
	}
}

func (t *Tables) related(domain string) bool {
	p := t.peers[domain]
	return p != nil && p.related
}

func (c *compiler) suggestPeer(domain string) string {
	var related []string
	for name, p := range c.tables.peers {
		if p.related {
			related = append(related, name)
		}
	}
	if s := didYouMean(domain, related); s != "" {
		return s
	}
	return "declare kind: Relationship for " + domain
}

func (t *Tables) relationshipEnds(o *statev1.Object) []string {
	peer := o.GetRelationship().GetTrustDomain()
	ends := []string{"the bundle of " + peer + " is forgotten: no SVID of it counts here, and all calls between the two domains are refused"}
	var exported []string
	for _, s := range t.Services() {
		if rules := t.serving[export{peer, s.Label}]; len(rules) > 0 {
			exported = append(exported, s.Label)
		}
	}
	if len(exported) > 0 {
		ends = append(ends, "callers of "+peer+" lose "+strings.Join(exported, ", "))
	}
	var imported []string
	for _, name := range t.Imports() {
		if t.targets[name].TrustDomain.Name() == peer {
			imported = append(imported, name)
		}
	}
	if len(imported) > 0 {
		ends = append(ends, "callers of "+t.td.Name()+" lose "+strings.Join(imported, ", "))
	}
	return ends
}
