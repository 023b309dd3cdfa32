// Package edge is the listener role of the gateway for clients that have no SVID:
// users and partners. It ends their TLS, verifies their token, holds them to the
// rate of their tier, picks the service by path, and is from there on an ordinary
// caller of the mesh with an SVID of its own. Consumers, tiers and plans live here
// and never enter the engine.
package edge

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/dataplane/header"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Config is the edge section of gateway.yaml.
type Config struct {
	Listen      string          `yaml:"listen,required"` // host:port
	Connections Connections     `yaml:"connections"`
	TLS         TLS             `yaml:"tls,required"`
	Identity    string          `yaml:"identity,required"` // SPIFFE path it calls the mesh with, "/edge"
	JWT         JWT             `yaml:"jwt,required"`
	TierClaim   string          `yaml:"tierClaim"` // claim that names the tier; default "tier"
	Tiers       map[string]Tier `yaml:"tiers,required"`
	Routes      []Route         `yaml:"routes,required"`
}

// Connections bounds what clients may have open at a time. Those that have shown a good
// token keep their place; the others lose it to whoever comes later from the same address.
type Connections struct {
	Most       int `yaml:"most,min=0,max=1048576"`       // default 16384; without a token a quarter of them
	PerAddress int `yaml:"perAddress,min=0,max=1048576"` // IPv6: of one /64; default a quarter of most
}

func (c Connections) limits() (strangers, known admission.Limits) {
	most := cmp.Or(c.Most, 16384)
	each := min(cmp.Or(c.PerAddress, most/4), most)
	known = admission.Limits{Most: most, PerSource: max(each, 1), Patience: admission.Never}
	return admission.Limits{Most: max(most/4, 1), PerSource: max(each/4, 1), Patience: undisturbed}, known
}

// TLS is the server certificate that clients see, from files; read again when they change.
type TLS struct {
	CertFile string `yaml:"certFile,required"`
	KeyFile  string `yaml:"keyFile,required"`
}

// JWT says which tokens are good (RFC 7519, RFC 8725).
type JWT struct {
	JWKSFile   string   `yaml:"jwksFile,required"` // read again when it changes
	Issuer     string   `yaml:"issuer,required"`
	Audience   string   `yaml:"audience,required"`
	Algorithms []string `yaml:"algorithms,required"` // pinned, asymmetric ones only
	Strip      *bool    `yaml:"strip"`               // of earlier releases: true is what is done anyway
}

// Tier is a plan: how fast each of its consumers may ask.
type Tier struct {
	Rate  yamlfile.Rate `yaml:"rate,required"` // "100/s"
	Burst int           `yaml:"burst"`         // requests; default one second's worth
}

// Route sends a path prefix (whole segments, Gateway API PathPrefix) to a service.
type Route struct {
	PathPrefix  string `yaml:"pathPrefix,required"`
	Service     string `yaml:"service,required"` // portfolio.trading.example
	StripPrefix bool   `yaml:"stripPrefix"`
	// Pass names the credentials of users that the service is to see: Authorization, Cookie,
	// X-Api-Key and the like, "?access_token" in the query. Another domain's sees none.
	Pass []string `yaml:"pass"`
}

// check refuses what strict decoding cannot see.
func (c *Config) check() error {
	var errs []error
	if !strings.HasPrefix(c.Identity, "/") {
		errs = append(errs, fmt.Errorf("edge.identity: %q is not a SPIFFE path; it begins with a slash", c.Identity))
	}
	if c.JWT.Strip != nil && !*c.JWT.Strip {
		errs = append(errs, errors.New("edge.jwt.strip: users' tokens are no longer passed on by default; leave strip out, and write pass: [Authorization] at each route whose service is to see them"))
	}
	seen := map[string]bool{}
	for i, r := range c.Routes {
		if !strings.HasPrefix(r.PathPrefix, "/") || r.PathPrefix != "/" && strings.HasSuffix(r.PathPrefix, "/") {
			errs = append(errs, fmt.Errorf("edge.routes[%d].pathPrefix: %q must begin with a slash and not end with one", i, r.PathPrefix))
		}
		if seen[r.PathPrefix] {
			errs = append(errs, fmt.Errorf("edge.routes[%d].pathPrefix: %q stands twice", i, r.PathPrefix))
		}
		seen[r.PathPrefix] = true
		for _, name := range r.Pass {
			parameter, query := strings.CutPrefix(name, "?")
			if query && !header.QueryCredential(parameter) || !query && (!header.Credential(name) || strings.EqualFold(name, "Proxy-Authorization")) {
				errs = append(errs, fmt.Errorf("edge.routes[%d].pass: %q is not a credential that is held back; name a header such as Authorization or Cookie, or \"?access_token\"", i, name))
			}
		}
	}
	for name, tier := range c.Tiers {
		if tier.Rate.PerSecond <= 0 || tier.Burst < 0 {
			errs = append(errs, fmt.Errorf("edge.tiers.%s: rate must be positive and burst not negative", name))
		}
	}
	return errors.Join(errs...)
}

// routes are ordered longest prefix first.
type routes []Route

func newRoutes(list []Route) routes {
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, func(a, b Route) int { return len(b.PathPrefix) - len(a.PathPrefix) })
	return sorted
}

// match returns the route of an escaped path and the path to ask the service for.
func (rs routes) match(path string) (Route, string, bool) {
	for _, r := range rs {
		prefix := strings.TrimSuffix(r.PathPrefix, "/")
		rest, ok := strings.CutPrefix(path, prefix)
		if !ok || rest != "" && rest[0] != '/' {
			continue
		}
		if !r.StripPrefix {
			return r, path, true
		}
		if rest == "" {
			rest = "/"
		}
		return r, rest, true
	}
	return Route{}, "", false
}
