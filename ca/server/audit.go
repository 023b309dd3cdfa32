package server

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/signer"
)

// Audit writes one line of JSON for each administrative act, granted or refused, at the
// node that was asked, and for each SVID, at the node that signed. Lines hold no secret
// (I1). A line that cannot be written stops nothing: it is counted, and said once in
// the process's log. Methods may be called concurrently.
type Audit struct {
	node     string
	log      *slog.Logger
	failures prometheus.Counter

	mu     sync.Mutex
	w      io.Writer
	failed bool
}

// NewAudit writes to w, one Write for each line. registerer may be nil.
func NewAudit(w io.Writer, node string, log *slog.Logger, registerer prometheus.Registerer) *Audit {
	a := &Audit{node: node, log: log, w: w, failures: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "entente_ca_audit_failures_total", Help: "Audit lines that could not be written.",
	})}
	if registerer != nil {
		registerer.MustRegister(a.failures)
	}
	return a
}

// act is an administrative act.
type act struct {
	Time     string   `json:"time"`
	Kind     string   `json:"kind"` // "act"
	Node     string   `json:"node"`
	Who      string   `json:"who"`
	What     string   `json:"what"`
	On       []string `json:"on,omitempty"` // what it was done to
	Result   string   `json:"result"`       // "done", "refused"
	Reason   string   `json:"reason,omitempty"`
	Revision string   `json:"revision,omitempty"`
}

// issued is an SVID.
type issued struct {
	Time       string `json:"time"`
	Kind       string `json:"kind"` // "x509-svid"
	Node       string `json:"node"`
	Who        string `json:"who"` // agent it was given to; the node itself for its own
	SPIFFEID   string `json:"spiffe_id"`
	Entry      string `json:"entry,omitempty"`
	Generation string `json:"entry_generation,omitempty"`
	Serial     string `json:"serial"` // hex
	Authority  string `json:"authority"`
	NotAfter   string `json:"not_after"`
	Revision   string `json:"revision"`
}

func (a *Audit) write(line any) {
	if a == nil {
		return
	}
	data, err := json.Marshal(line)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		_, err = a.w.Write(append(data, '\n'))
	}
	if err == nil {
		a.failed = false
		return
	}
	a.failures.Inc()
	if !a.failed {
		a.failed = true
		a.log.Error("the audit log cannot be written: acts and SVIDs go unrecorded until it can", "error", err)
	}
}

func stamp() string { return time.Now().UTC().Format(time.RFC3339Nano) }

// Act records that somebody did something, or was refused to.
func (a *Audit) Act(who, what string, on []string, revision uint64, err error) {
	if a == nil {
		return
	}
	line := act{Time: stamp(), Kind: "act", Node: a.node, Who: who, What: what, On: on, Result: "done"}
	if revision != 0 {
		line.Revision = ca.Revision(revision).String()
	}
	if err != nil {
		line.Result, line.Reason = "refused", status.Convert(err).Message()
	}
	a.write(line)
}

// Command records what a node has had agreed by itself.
func (a *Audit) Command(command *statev1.Command, outcome domain.Outcome, err error) {
	if a == nil {
		return
	}
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	what, on := commandName(command)
	a.Act(cmp.Or(command.GetActor(), "CA node "+a.node), what, on, outcome.Revision, err)
}

// Issued records an SVID.
func (a *Audit) Issued(i signer.Issued, revision uint64) {
	if a == nil {
		return
	}
	line := issued{
		Time: stamp(), Kind: "x509-svid", Node: a.node, Who: i.Origin.Agent, SPIFFEID: i.ID.String(), Entry: i.Origin.Entry,
		Serial: i.Serial, Authority: i.Authority, NotAfter: i.NotAfter.UTC().Format(time.RFC3339), Revision: ca.Revision(revision).String(),
	}
	if line.Who == "" {
		line.Who = "CA node " + a.node
	}
	if i.Origin.EntryGeneration != 0 {
		line.Generation = ca.Revision(i.Origin.EntryGeneration).String()
	}
	a.write(line)
}

func commandName(command *statev1.Command) (what string, on []string) {
	what = strings.TrimPrefix(fmt.Sprintf("%T", command.GetBody()), "*statev1.Command_")
	switch body := command.GetBody().(type) {
	case *statev1.Command_PrepareAuthority:
		on = []string{"authority/" + body.PrepareAuthority.GetAuthority().GetId()}
	case *statev1.Command_AuthorityReady:
		on = append([]string{"authority/" + body.AuthorityReady.GetId()}, prefixed("assumed: ", body.AuthorityReady.GetAssumed())...)
	case *statev1.Command_AuthorityDrained:
		on = append([]string{"authority/" + body.AuthorityDrained.GetId()}, prefixed("assumed: ", body.AuthorityDrained.GetAssumed())...)
	case *statev1.Command_ActivateAuthority:
		on = []string{"authority/" + body.ActivateAuthority.GetId()}
	case *statev1.Command_StoreForeignBundle:
		on = []string{"bundle/" + body.StoreForeignBundle.GetTrustDomain()}
	}
	return what, on
}

func prefixed(prefix string, list []string) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = prefix + s
	}
	return out
}

// maxNamed bounds how many things one act's line names.
const maxNamed = 1000

// audit records a call if it is an act; what only reads is none.
func (s *Server) audit(ctx context.Context, req, resp any, err error) {
	if s.Audit == nil {
		return
	}
	what, on := "", []string(nil)
	name := func(kind, key string) {
		switch {
		case len(on) < maxNamed:
			on = append(on, kind+key)
		case len(on) == maxNamed:
			on = append(on, "and more")
		}
	}
	switch r := req.(type) {
	case *ententev1.CreateTokenRequest:
		what = "CreateToken"
		if r.GetNode() != nil {
			name("node/", r.GetNode().GetName())
		} else {
			name("agent/", r.GetAgent().GetName())
		}
		if made, ok := resp.(*ententev1.CreateTokenResponse); ok && made != nil {
			name("token/", made.GetId())
		}
	case *ententev1.ApplyRequest:
		if r.GetDryRun() {
			return
		}
		what = "Apply"
		if done, ok := resp.(*ententev1.ApplyResponse); ok && done != nil {
			for _, change := range done.GetChanges() {
				if change.GetAction() != "unchanged" {
					name(change.GetAction()+" ", change.GetKey().GetKind()+"/"+change.GetKey().GetName())
				}
			}
		} else {
			for _, o := range r.GetObjects() {
				name("", domain.ObjectKey(o))
			}
			for _, key := range r.GetDeletes() {
				name("delete ", key.GetKind()+"/"+key.GetName())
			}
		}
	case *ententev1.PrepareAuthorityRequest:
		what = "PrepareAuthority"
		if done, ok := resp.(*ententev1.ChangeAuthorityResponse); ok && done != nil {
			name("authority/", done.GetAuthority().GetId())
		}
	case *ententev1.ChangeAuthorityRequest:
		what = "ChangeAuthority"
		if r.GetNow() {
			name("", "now")
		}
		for _, node := range r.GetExclude() {
			name("without the word of node/", node)
		}
		name("authority/", r.GetId())
		if done, ok := resp.(*ententev1.ChangeAuthorityResponse); ok && done != nil {
			for _, who := range done.GetHeldBy() {
				name("held by ", who)
			}
		}
	case *ententev1.RemoveNodeRequest:
		what = "RemoveNode"
		name("node/", r.GetName())
		if r.GetCompromised() {
			name("", "compromised")
		}
	case *ententev1.ChangeAgentRequest:
		what = "ChangeAgent"
		name("agent/", r.GetName())
	case *ententev1.RevokeTokenRequest:
		what = "RevokeToken"
		name("token/", r.GetId())
	case *ententev1.ChangeEntriesRequest:
		if r.GetDryRun() {
			return
		}
		what = "ChangeEntries"
		done, _ := resp.(*ententev1.ChangeEntriesResponse)
		for _, result := range done.GetResults() {
			if result.GetError() != "" {
				name("refused ", result.GetId()+": "+result.GetError())
			} else {
				name(result.GetAction()+" ", result.GetId())
			}
		}
	case *ententev1.JoinRequest:
		what = "Join"
		name("token/", r.GetTokenId())
		if done, ok := resp.(*ententev1.JoinResponse); ok && done != nil {
			name("node/", done.GetMember().GetName())
		}
	case *ententev1.AttestRequest:
		what = "Attest"
		if r.GetTokenId() != "" {
			name("token/", r.GetTokenId())
		}
		if done, ok := resp.(*ententev1.AttestResponse); ok && done != nil {
			name("agent/", done.GetAgent().GetName())
		}
	default:
		return
	}
	if method, ok := methodFrom(ctx); ok && strings.HasPrefix(what, "Change") {
		what = method // Taint, Revoke, Ban, ...
	}
	var revision uint64
	if r, ok := resp.(interface{ GetRevision() uint64 }); ok && err == nil {
		revision = r.GetRevision()
	}
	s.Audit.Act(callerFrom(ctx).who(), what, on, revision, err)
}
