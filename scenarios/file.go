package scenarios

import (
	"bytes"
	"fmt"
	"os"
	"time"

	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Scenario is a scenario file.
type Scenario struct {
	yamlfile.Pos
	APIVersion string   `yaml:"apiVersion,required,oneof=entente/v1"`
	Kind       string   `yaml:"kind,required,oneof=Scenario"`
	Metadata   Metadata `yaml:"metadata,required"`
	Spec       Spec     `yaml:"spec,required"`
}

// Metadata names a scenario.
type Metadata struct {
	yamlfile.Pos
	Name  string `yaml:"name,required"` // one DNS label
	Title string `yaml:"title"`
}

// Spec is the platform and the story played on it.
type Spec struct {
	yamlfile.Pos
	Datacenters  []Datacenter  `yaml:"datacenters,required"`
	TrustDomains []TrustDomain `yaml:"trustDomains,required"`
	Agreements   []Agreement   `yaml:"agreements"`
	Load         []Load        `yaml:"load"`
	Story        []Chapter     `yaml:"story,required"`
	Limits       Limits        `yaml:"limits"`
}

// Datacenter has a /16 of the loopback network 127.0.0.0/8 for itself.
type Datacenter struct {
	yamlfile.Pos
	Name    string `yaml:"name,required"`
	Network string `yaml:"network,required"` // 127.N.0.0/16
}

// TrustDomain is one mesh with its own CA.
type TrustDomain struct {
	yamlfile.Pos
	Name      string    `yaml:"name,required"`
	Title     string    `yaml:"title"`
	CA        []string  `yaml:"ca,required"`   // datacenters with a CA node
	Mesh      []string  `yaml:"mesh,required"` // datacenters with an agent, a gateway and every service
	Lifetimes Lifetimes `yaml:"lifetimes"`
	Upstream  bool      `yaml:"upstream"` // a root of its own on disk certifies its CA nodes
	Services  []Service `yaml:"services,required"`
	Edge      *Edge     `yaml:"edge"`
}

// Lifetimes of what the CA issues; zero is the CA's default.
type Lifetimes struct {
	yamlfile.Pos
	X509SVID          time.Duration `yaml:"x509SVID,min=4s"`
	BundleRefreshHint time.Duration `yaml:"bundleRefreshHint,min=1s"`
}

// Service is one HTTP service, in every datacenter of the mesh.
type Service struct {
	yamlfile.Pos
	Name     string            `yaml:"name,required"`
	Program  string            `yaml:"program,oneof=accounts|ledger|portfolio|market-data|orders"` // empty: only answers
	Alone    bool              `yaml:"alone"`                                                      // a process of its own
	Calls    []string          `yaml:"calls"`                                                      // service names; empty: it calls nobody
	Export   []string          `yaml:"export"`                                                     // trust domains
	Failover *FailoverPolicy   `yaml:"failover"`
	Answers  map[string]string `yaml:"answers"` // path -> JSON
}

// FailoverPolicy is the failover section of the service's catalogue object.
type FailoverPolicy struct {
	yamlfile.Pos
	Mode     string        `yaml:"mode,oneof=auto|manual"`
	Order    []string      `yaml:"order"`
	Failback string        `yaml:"failback,oneof=auto|manual"`
	Hold     time.Duration `yaml:"hold"`
}

// Edge is the entrance for phones.
type Edge struct {
	yamlfile.Pos
	Identity string          `yaml:"identity,required"` // label of the service it calls as
	In       []string        `yaml:"in,required"`       // datacenters
	Issuer   string          `yaml:"issuer,required"`
	Audience string          `yaml:"audience,required"`
	Tiers    map[string]Tier `yaml:"tiers,required"`
	Routes   []Route         `yaml:"routes,required"`
}

// Tier is what a phone's tier claim is worth.
type Tier struct {
	yamlfile.Pos
	Rate  yamlfile.Rate `yaml:"rate,required"`
	Burst int           `yaml:"burst,min=1"`
}

// Route leads a path prefix to a service of the edge's domain.
type Route struct {
	yamlfile.Pos
	PathPrefix  string `yaml:"pathPrefix,required"`
	Service     string `yaml:"service,required"`
	StripPrefix bool   `yaml:"stripPrefix"`
}

// Agreement is applied at both sides, each in its own shape.
type Agreement struct {
	yamlfile.Pos
	Name    string `yaml:"name,required"`
	Between struct {
		yamlfile.Pos
		Server string `yaml:"server,required"`
		Caller string `yaml:"caller,required"`
	} `yaml:"between,required"`
	ValidFor time.Duration `yaml:"validFor,required,min=24h"`
	Allow    []Allow       `yaml:"allow,required"`
}

// Allow lets callers of one domain reach a service of the other.
type Allow struct {
	yamlfile.Pos
	Callers    []string `yaml:"callers,required"`
	Service    string   `yaml:"service,required"`
	Methods    []string `yaml:"methods"`
	PathPrefix string   `yaml:"pathPrefix"`
}

// phone stands where a request may name a service as its sender: a client without
// an SVID, outside every datacenter, with a JWT.
const phone = "phone"

// Load is a group of clients that send requests at a constant rate.
type Load struct {
	yamlfile.Pos
	Name       string        `yaml:"name,required"`
	From       string        `yaml:"from,required"`       // phone, or a service name
	Datacenter string        `yaml:"datacenter,required"` // of the edge that phones prefer, or of the calling instance
	ServedBy   string        `yaml:"servedBy,required"`   // datacenter that answers while nothing is lost
	Clients    int           `yaml:"clients,min=1,max=64"`
	Tier       string        `yaml:"tier"`
	Method     string        `yaml:"method,oneof=GET|POST"`
	URL        string        `yaml:"url,required"` // phones: a path; services: http://NAME/PATH
	Rate       yamlfile.Rate `yaml:"rate,required"`
	Deadline   time.Duration `yaml:"deadline,required,min=100ms,max=30s"`
}

func (l Load) idempotent() bool { return l.Method != "POST" }

// Chapter is one step of the story: exactly one of its parts is given.
type Chapter struct {
	yamlfile.Pos
	Name    string       `yaml:"name,required"`
	Start   *StartStep   `yaml:"start"`
	Call    *CallStep    `yaml:"call"`
	Refuse  []Refusal    `yaml:"refuse"`
	Lose    *LoseStep    `yaml:"lose"`
	Endure  *EndureStep  `yaml:"endure"`
	Restore *RestoreStep `yaml:"restore"`
}

// StartStep starts every process: CAs have leaders, agents are attested, every service has its SVID.
type StartStep struct {
	yamlfile.Pos
	Within time.Duration `yaml:"within,required"`
}

// CallStep makes one request and follows it through every process on its way.
type CallStep struct {
	yamlfile.Pos
	Request Request  `yaml:"request,required"`
	Shows   []string `yaml:"shows"` // members of the JSON answer that must be there
	Sees    []Seen   `yaml:"sees"`
	Legs    []Leg    `yaml:"legs"`
}

// Seen: the application of a service was told that this was its caller.
type Seen struct {
	yamlfile.Pos
	Service string `yaml:"service,required"`
	Caller  string `yaml:"caller,required"` // SPIFFE ID without the scheme
}

// Leg is one mutually authenticated TLS connection on the way of a request: the
// dialler verified to, and the server verified from. Both without the scheme.
type Leg struct {
	yamlfile.Pos
	From string `yaml:"from,required"`
	To   string `yaml:"to,required"`
}

// Request is who asks what.
type Request struct {
	yamlfile.Pos
	From       string `yaml:"from,required"` // phone, or a service name
	Datacenter string `yaml:"datacenter,required"`
	Method     string `yaml:"method,oneof=GET|POST"`
	URL        string `yaml:"url,required"`
	Token      string `yaml:"token,oneof=good|none|expired|forged"`
	Tier       string `yaml:"tier"`
	Times      int    `yaml:"times,min=1,max=100"` // at once
}

// Attempt is a request, or a bare TLS dial.
type Attempt struct {
	yamlfile.Pos
	Call *Request `yaml:"call"`
	Dial *Dial    `yaml:"dial"`
}

// Dial connects to a mesh listener with an SVID.
type Dial struct {
	yamlfile.Pos
	As         string `yaml:"as"`     // service name: its true SVID, as its process got it from the Workload API
	Forged     string `yaml:"forged"` // SPIFFE ID: an SVID of it signed by a CA that nobody trusts
	Datacenter string `yaml:"datacenter,required"`
	Sidecar    string `yaml:"sidecar"` // of this trust domain's agent
	Gateway    string `yaml:"gateway"` // of this trust domain
}

// Refusal is an attempt that must be refused, and its control, which must be answered.
type Refusal struct {
	yamlfile.Pos
	Name    string       `yaml:"name,required"`
	Call    *Request     `yaml:"call"`
	Dial    *Dial        `yaml:"dial"` // to be refused by TLS itself
	Expect  *RefusedWith `yaml:"expect"`
	Control Attempt      `yaml:"control,required"`
}

// RefusedWith is the answer to a call that is refused.
type RefusedWith struct {
	yamlfile.Pos
	Status int    `yaml:"status,required,min=400,max=599"`
	Reason string `yaml:"reason,required"`
}

// LoseStep starts the load and then ends every process of a datacenter with SIGKILL.
// The load goes on until a RestoreStep, or the end of the story.
type LoseStep struct {
	yamlfile.Pos
	Datacenter string        `yaml:"datacenter,required"`
	Load       []string      `yaml:"load,required"`
	Before     time.Duration `yaml:"before,required,min=500ms"`
	After      time.Duration `yaml:"after,required,min=500ms"`
	Expect     LossLimits    `yaml:"expect,required"`
}

// LossLimits are the most that a loss may cost. They hold for each group of
// idempotent requests; of others only the outcome is counted.
type LossLimits struct {
	yamlfile.Pos
	Failed     int           `yaml:"failed"`
	LongestGap time.Duration `yaml:"longestGap"`
	Switched   time.Duration `yaml:"switched"`
}

// EndureStep looks at what goes on without the lost datacenter.
type EndureStep struct {
	yamlfile.Pos
	Quorum  []string      `yaml:"quorum"`  // trust domains whose CA must still have a majority and a leader
	Renewed string        `yaml:"renewed"` // datacenter in which every service must get a newer SVID
	Within  time.Duration `yaml:"within,required"`
}

// RestoreStep starts the lost processes again, with their disks, and waits until
// every group of clients is served from there again.
type RestoreStep struct {
	yamlfile.Pos
	Datacenter string        `yaml:"datacenter,required"`
	Within     time.Duration `yaml:"within,required"`
	Expect     LossLimits    `yaml:"expect"`
}

// Limits of the whole run; zero is none.
type Limits struct {
	yamlfile.Pos
	Time      time.Duration `yaml:"time"`
	MemoryMiB int           `yaml:"memoryMiB,min=1"` // resident, shared pages counted in each process
}

// Read reads a scenario and refuses what cannot be played, before anything is
// started. The error is a yamlfile.Errors: each names its line.
func Read(file string, data []byte) (*Scenario, error) {
	var s Scenario
	if err := yamlfile.Decode(file, bytes.NewReader(data), &s); err != nil {
		return nil, err
	}
	s.defaults()
	if errs := check(&s); len(errs) > 0 {
		return nil, errs
	}
	return &s, nil
}

// ReadFile reads the scenario of a file; the empty name is the built-in one.
func ReadFile(file string) (*Scenario, error) {
	if file == "" {
		return Read("financial-platform.yaml", FinancialPlatform)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the scenario: %w", err)
	}
	return Read(file, data)
}

func (s *Scenario) defaults() {
	for i := range s.Spec.Load {
		l := &s.Spec.Load[i]
		if l.Method == "" {
			l.Method = "GET"
		}
		if l.Clients == 0 {
			l.Clients = 1
		}
	}
	for i := range s.Spec.Story {
		c := &s.Spec.Story[i]
		if c.Call != nil {
			c.Call.Request.defaults()
		}
		for j := range c.Refuse {
			c.Refuse[j].Call.defaults()
			c.Refuse[j].Control.Call.defaults()
		}
	}
}

func (r *Request) defaults() {
	if r == nil {
		return
	}
	if r.Method == "" {
		r.Method = "GET"
	}
	if r.Token == "" {
		r.Token = "good"
	}
	if r.Times == 0 {
		r.Times = 1
	}
}
