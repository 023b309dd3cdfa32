package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/signer"
)

// Audit writes one line of JSON for each administrative act, granted or refused, at the
// node that was asked (and at the leader, if that was another one), and for each SVID, at
// the node that signed. Lines hold no secret (I1).
//
// Nobody who asks for SVIDs or is refused can fill the disk (I14): where the log is
// Bounded, its last quarter takes no more SVIDs one by one, but how many were signed for
// each entry and minute; its last eighth only how many of each kind; and the rest is for
// acts. The last part of that is not for administrators of a prefix: they add nothing to the
// domain then, but take away what they like. One caller's refusals have a rate, beyond which
// they are counted.
//
// An act that cannot be written goes to the process's log, is counted, and the first line
// that can be written again says how many are missing. An SVID whose line cannot be
// written is counted as above. Nothing of that stops an SVID: hosts must not lose their
// identities because a disk is full. Acts of administrators go on as well, since one of
// them may be what frees the disk, unless the log is required. A disk that hangs is waited
// for once, for writePatience; until it answers, lines count as not written. The one that
// it took late then stands there and is counted.
// Methods may be called concurrently.
type Audit struct {
	node     string
	required bool
	log      *slog.Logger
	failures prometheus.Counter
	counted  prometheus.Counter
	refusals *rates

	mu        sync.Mutex
	w         io.Writer
	lost      uint64             // acts, since the last line that was written
	torn      bool               // the last line was written in part
	left      int64              // of the bound, when a line was last to be written
	bound     int64              // 0: there is none, or nothing was to be written yet
	hangs     <-chan written     // a line that is not waited for any longer; nil: none
	counts    map[countKey]int64 // what was counted and is not written yet
	since     time.Time          // when the first of counts was counted
	counting  error              // why SVIDs are counted; nil: they have lines
	unwritten error              // why acts are lost; nil: they are not
}

// Bounded is where audit lines go if their size has a bound. Room is how many bytes are
// left, of how many.
type Bounded interface {
	io.Writer
	Room() (left, bound int64)
}

// What part of a bound must be left for a line to be written.
const (
	roomForSVIDs  = 1. / 4
	roomForCounts = 1. / 8
	roomForTotals = 1. / 16
	roomForOwners = 1. / 32
	roomForActs   = 0
)

const (
	maxCounts     = 10_000 // entries and callers that are counted apart
	countInterval = time.Minute
	writePatience = 2 * time.Second
	refusalRate   = 1 // refusals of one caller a second that have a line each; maxBatch at once
)

// errAuditFull: the bound leaves no room for a line of this kind.
var errAuditFull = errors.New("the audit log is at its bound (audit.maxSize), or its file system has only the room left that the replicated log needs; move the closed files (NAME.TIME) elsewhere")

// errAuditHangs: a line was handed to the disk and did not come back.
var errAuditHangs = fmt.Errorf("the disk of the audit log does not answer: a line was not written within %v", writePatience)

// written is how handing one line to the log ended.
type written struct {
	full        bool // there was no room: nothing was written
	n           int
	err         error
	left, bound int64 // before it
}

// NewAudit writes to w, one Write for each line; w may be Bounded. With required, acts of
// administrators are refused while lines cannot be written. registerer may be nil.
func NewAudit(w io.Writer, node string, required bool, log *slog.Logger, registerer prometheus.Registerer) *Audit {
	a := &Audit{
		node: node, required: required, log: log, w: w, counts: make(map[countKey]int64),
		refusals: newRates(refusalRate, 0, "refusals"),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "entente_ca_audit_failures_total", Help: "Audit lines that could not be written.",
		}),
		counted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "entente_ca_audit_lines_counted_total", Help: "SVIDs and refusals that have no audit line of their own, but are counted in one.",
		}),
	}
	if registerer != nil {
		registerer.MustRegister(a.failures, a.counted)
	}
	return a
}

// act is an administrative act.
type act struct {
	Time     string   `json:"time"`
	Kind     string   `json:"kind"` // "act"
	Node     string   `json:"node"`
	Who      string   `json:"who"`
	Via      string   `json:"via,omitempty"` // the CA node that says so, if this one did not see it itself
	What     string   `json:"what"`
	On       []string `json:"on,omitempty"` // what it was done to
	Result   string   `json:"result"`       // "done", "refused"; "asked" ahead of it where the log is required
	Reason   string   `json:"reason,omitempty"`
	Revision string   `json:"revision,omitempty"`
}

// issued is an SVID.
type issued struct {
	Time       string   `json:"time"`
	Kind       string   `json:"kind"` // "x509-svid", "jwt-svid", "wit-svid"
	Node       string   `json:"node"`
	Who        string   `json:"who"` // agent it was given to; the node itself for its own
	SPIFFEID   string   `json:"spiffe_id"`
	Entry      string   `json:"entry,omitempty"`
	Generation string   `json:"entry_generation,omitempty"`
	Serial     string   `json:"serial,omitempty"` // hex; of an X.509-SVID
	Digest     string   `json:"digest,omitempty"` // of a token: hex SHA-256 of its header and payload, as they stand before the signature
	Audience   []string `json:"audience,omitempty"`
	Authority  string   `json:"authority"` // a token's kid as well
	NotAfter   string   `json:"not_after"`
	Revision   string   `json:"revision"`
}

// countKey is what is counted together.
type countKey struct {
	of    string // a kind of SVID, or "refused"
	entry string // of SVIDs; empty: agents' own, or several
	who   string // of refusals
	what  string // of refusals
	more  bool   // several entries or callers, beyond maxCounts or the room for them
}

// count stands for SVIDs or refusals that have no line each.
type count struct {
	Time   string `json:"time"`
	Kind   string `json:"kind"` // "count"
	Node   string `json:"node"`
	Since  string `json:"since"`
	Of     string `json:"of"` // a kind of SVID, or "refused"
	Number int64  `json:"number"`
	Entry  string `json:"entry,omitempty"`
	Who    string `json:"who,omitempty"`
	What   string `json:"what,omitempty"`
	More   bool   `json:"more,omitempty"` // of several entries or callers
}

// gap is the first line after some that could not be written.
type gap struct {
	Time string `json:"time"`
	Kind string `json:"kind"` // "gap"
	Node string `json:"node"`
	Lost uint64 `json:"lost"` // lines
}

// write writes an act's line, or sends it to the process's log.
func (a *Audit) write(line act) {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.mend()
	if err == nil {
		err = a.append(line, roomForActs)
	}
	if err == nil {
		return
	}
	a.failures.Inc()
	a.unwritten = err
	if a.lost++; a.lost == 1 {
		a.log.Error("the audit log cannot be written: administrative acts are recorded here only, until it can", "error", err)
	}
	data, _ := json.Marshal(line)
	a.log.Warn("administrative act that is missing in the audit log", "line", string(data))
}

// mend says how many lines are missing, as soon as that can be said.
func (a *Audit) mend() error {
	if a.lost == 0 {
		return nil
	}
	if err := a.append(gap{Time: stamp(), Kind: "gap", Node: a.node, Lost: a.lost}, roomForActs); err != nil {
		return err
	}
	a.log.Info("the audit log can be written again", "lost_lines", a.lost)
	a.lost, a.unwritten = 0, nil
	return nil
}

// append writes a line if at least part of the bound is left after it.
func (a *Audit) append(line any, part float64) error {
	data, err := json.Marshal(line)
	if err != nil {
		return err
	}
	if a.hangs != nil {
		select {
		case late := <-a.hangs:
			a.hangs = nil
			a.settle(late) // only whether it is whole: that it is late has been dealt with
		default:
			return errAuditHangs
		}
	}
	if a.torn {
		data = append([]byte{'\n'}, data...)
	}
	data = append(data, '\n')
	done := make(chan written, 1)
	go func() { done <- put(a.w, data, part) }() // ends when the disk answers
	patience := time.NewTimer(writePatience)
	defer patience.Stop()
	select {
	case w := <-done:
		return a.settle(w)
	case <-patience.C:
		a.hangs = done
		return errAuditHangs
	}
}

// put is the part of append that may hang.
func put(w io.Writer, line []byte, part float64) written {
	var left, bound int64
	if b, ok := w.(Bounded); ok {
		if left, bound = b.Room(); bound > 0 && left-int64(len(line)) < int64(part*float64(bound)) {
			return written{full: true, left: left, bound: bound}
		}
	}
	n, err := w.Write(line)
	return written{n: n, err: err, left: left, bound: bound}
}

func (a *Audit) settle(w written) error {
	a.left, a.bound = w.left-int64(w.n), w.bound
	switch {
	case w.full:
		return errAuditFull
	case w.err != nil:
		a.torn = a.torn || w.n > 0
		return w.err
	}
	a.torn = false
	return nil
}

// count counts what has no line of its own. a.mu is held.
func (a *Audit) count(key countKey, n int64) {
	if _, there := a.counts[key]; !there && len(a.counts) >= maxCounts {
		key = countKey{of: key.of, more: true}
	}
	if len(a.counts) == 0 {
		a.since = time.Now()
	}
	a.counts[key] += n
}

// Run writes each minute what was counted, until ctx is done.
func (a *Audit) Run(ctx context.Context) error {
	ticker := time.NewTicker(countInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			a.Flush()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Flush writes what was counted. What there is no room for is kept as one number for each
// kind, so that a bound or a full disk costs detail and no number.
func (a *Audit) Flush() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	since := a.since.UTC().Format(time.RFC3339Nano)
	kept := make(map[countKey]int64)
	write := func(counts map[countKey]int64, part float64) (err error) {
		for key, n := range counts {
			if err == nil {
				err = a.append(count{Time: stamp(), Kind: "count", Node: a.node, Since: since, Of: key.of, Number: n,
					Entry: key.entry, Who: key.who, What: key.what, More: key.more}, part)
			}
			delete(counts, key)
			if err != nil {
				kept[countKey{of: key.of, more: true}] += n
			}
		}
		return err
	}
	if write(a.counts, roomForCounts) != nil {
		totals := kept
		kept = make(map[countKey]int64)
		if err := write(totals, roomForTotals); err != nil && !errors.Is(err, errAuditFull) {
			a.failures.Inc()
		}
	}
	a.counts = kept
}

// Problem is why SVIDs or acts have no line each at the moment; nil: they have.
func (a *Audit) Problem() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return cmp.Or(a.unwritten, a.counting)
}

// Asked records, where the log is required, that an act is about to be done, or says why
// it may not be: the log cannot be written.
func (a *Audit) Asked(who, what string) error {
	if a == nil || !a.required {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.mend()
	if err == nil {
		err = a.append(act{Time: stamp(), Kind: "act", Node: a.node, Who: who, What: what, Result: "asked"}, roomForActs)
	}
	if err != nil {
		return status.Errorf(codes.FailedPrecondition, "the audit log of this CA node cannot be written and is required (audit.required): %v; make room for it, or ask another CA node", err)
	}
	return nil
}

// Crowded says why an administrator of a prefix may add nothing to the domain: the room that
// is left in the log is for the others. It waits for no disk.
func (a *Audit) Crowded() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.bound == 0 || a.left >= int64(roomForOwners*float64(a.bound)) {
		return nil
	}
	return status.Errorf(codes.ResourceExhausted, "%v; what is left there is for operators and for administrators of the whole domain: until there is room, only take away, or ask another CA node", errAuditFull)
}

func stamp() string { return time.Now().UTC().Format(time.RFC3339Nano) }

// Refused records that a caller was refused, who may ask for ever. source is whose rate
// counts: the caller's, or that of all callers without an identity together.
func (a *Audit) Refused(source, who, what string, on []string, err error) {
	if a == nil {
		return
	}
	if a.refusals.Take(source, 1, time.Now()) > 0 {
		who = source
		a.counted.Inc()
		a.mu.Lock()
		defer a.mu.Unlock()
		a.count(countKey{of: "refused", who: who, what: what}, 1)
		return
	}
	a.act(who, "", what, on, 0, err)
}

// Act records that somebody did something, or was refused to.
func (a *Audit) Act(who, what string, on []string, revision uint64, err error) {
	if a != nil {
		a.act(who, "", what, on, revision, err)
	}
}

func (a *Audit) act(who, via, what string, on []string, revision uint64, err error) {
	line := act{Time: stamp(), Kind: "act", Node: a.node, Who: who, Via: via, What: what, On: on, Result: "done"}
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
	if a != nil {
		a.command(cmp.Or(command.GetActor(), "CA node "+a.node), "", command, outcome, err)
	}
}

// Forwarded records, at the leader, what another CA node has had agreed, and in whose name
// it says. Nobody else can tell whether that is so.
func (a *Audit) Forwarded(who, via string, command *statev1.Command, outcome domain.Outcome, err error) {
	if a != nil {
		a.command(cmp.Or(who, via), via, command, outcome, err)
	}
}

func (a *Audit) command(who, via string, command *statev1.Command, outcome domain.Outcome, err error) {
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	what, on := domain.About(command)
	a.act(who, via, what, on, outcome.Revision, err)
}

// Issued records an SVID.
func (a *Audit) Issued(i signer.Issued, revision uint64) {
	if a == nil {
		return
	}
	line := issued{
		Time: stamp(), Kind: i.Kind, Node: a.node, Who: i.Origin.Agent, SPIFFEID: i.ID.String(), Entry: i.Origin.Entry,
		Serial: i.Serial, Digest: i.Digest, Audience: shortAudience(i.Audience), Authority: i.Authority,
		NotAfter: i.NotAfter.UTC().Format(time.RFC3339), Revision: ca.Revision(revision).String(),
	}
	if line.Who == "" {
		line.Who = "CA node " + a.node
	}
	if i.Origin.EntryGeneration != 0 {
		line.Generation = ca.Revision(i.Origin.EntryGeneration).String()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.append(line, roomForSVIDs)
	if err == nil {
		if a.counting != nil {
			a.log.Info("SVIDs are recorded one by one again in the audit log")
			a.counting = nil
		}
		return
	}
	if !errors.Is(err, errAuditFull) {
		a.failures.Inc()
	}
	if a.counting == nil {
		a.log.Error("SVIDs are no longer recorded one by one in the audit log, but counted for each entry and minute", "error", err)
	}
	a.counting = err
	a.counted.Inc()
	a.count(countKey{of: i.Kind, entry: i.Origin.Entry}, 1)
}

const (
	maxAudience  = 128 // bytes of an audience that stands in a line as it is
	maxAudiences = 512 // bytes of all of them
)

// shortAudience is an audience for a line: what is long stands by its SHA-256, since the
// caller chooses it.
func shortAudience(audience []string) []string {
	short, size := make([]string, len(audience)), 0
	for i, one := range audience {
		if short[i] = one; len(one) > maxAudience {
			short[i] = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(one)))
		}
		size += len(short[i])
	}
	if size > maxAudiences {
		return []string{fmt.Sprintf("%d audiences, sha256:%x", len(audience), sha256.Sum256([]byte(strings.Join(audience, "\n"))))}
	}
	return short
}

const adminMethods = "/entente.v1.Admin/"

// dryRun is a request that may ask to change nothing.
type dryRun interface{ GetDryRun() bool }

// audit records a call if it is an act, or an administrative method that was refused to
// its caller.
func (s *Server) audit(ctx context.Context, req, resp any, err error) {
	name := methodFrom(ctx)
	m := methods[name]
	forbidden := strings.HasPrefix(name, adminMethods) && status.Code(err) == codes.PermissionDenied
	if s.Audit == nil || !forbidden && m.records != recordsAll {
		return
	}
	if r, ok := req.(dryRun); ok && r.GetDryRun() && !forbidden {
		return
	}
	var revision uint64
	if r, ok := resp.(interface{ GetRevision() uint64 }); ok && err == nil {
		revision = r.GetRevision()
	}
	c := callerFrom(ctx)
	if (undone(status.Code(err)) || err == nil && changedNothing(resp)) && c.class != local {
		s.Audit.Refused(c.String(), c.who(), path.Base(name), m.named(req, resp, maxRefused), err)
		return
	}
	s.Audit.Act(c.who(), path.Base(name), m.named(req, resp, maxNamed), revision, err)
}

// undone tells that a call was refused: that it changed nothing is certain. After any
// other error it may have been carried out, and that is never counted instead of written.
func undone(code codes.Code) bool {
	switch code {
	case codes.PermissionDenied, codes.Unauthenticated, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.ResourceExhausted:
		return true
	}
	return false
}

// changedNothing tells that a call answered for each change that it was refused or was so
// already.
func changedNothing(resp any) bool {
	switch r := resp.(type) {
	case *ententev1.ChangeEntriesResponse:
		return !slices.ContainsFunc(r.GetResults(), func(one *ententev1.EntryResult) bool {
			return one.GetAction() != "unchanged" && !undone(codes.Code(one.GetCode()))
		})
	case *ententev1.ApplyResponse:
		return !slices.ContainsFunc(r.GetChanges(), func(one *ententev1.ObjectChange) bool { return one.GetAction() != "unchanged" })
	}
	return false
}
