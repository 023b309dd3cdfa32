package scenarios

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/scenarios/load"
	"github.com/entente-mesh/entente/scenarios/platform"
)

// Pauses between looks at something that is awaited.
const (
	lookEvery     = 100 * time.Millisecond
	statusEvery   = 300 * time.Millisecond // each look is a process, or asks all of them
	recordsSettle = 3 * time.Second        // the longest an access record may take to its file
	sharedAgain   = 10                     // good answers that prove that a datacenter has its share again
)

// story is a scenario being played.
type story struct {
	*world
	report *Report
	say    *narrator

	lostAt     time.Time
	restoredAt time.Time
	lost       string
	lossEnd    time.Time // end of the measured window
	groups     []*group
	serials    map[string]string // service process and ID -> serial at the moment of the loss
}

// chapter is the step that is being played.
type chapter struct {
	Step
	say *narrator
}

// check asserts that something holds, and says so.
func (c *chapter) check(ok bool, what, want, got string) bool {
	c.Checks = append(c.Checks, Assertion{What: what, Want: want, Got: got, OK: ok})
	c.OK = c.OK && ok
	c.say.check(ok, what, want, got)
	return ok
}

// play plays the chapters one after the other. It goes on after assertions that did
// not hold, so that the table is complete, but not after an error.
func (s *story) play(ctx context.Context) error {
	for i := range s.spec.Story {
		part := &s.spec.Story[i]
		c := &chapter{Step: Step{Name: part.Name, OK: true, Checks: []Assertion{}}, say: s.say}
		s.say.chapter(i+1, part.Name)
		began := time.Now()
		err := s.playOne(ctx, c, part)
		for _, p := range s.supervisor.Died() {
			if err == nil && ctx.Err() == nil {
				err = p.Obituary()
			}
		}
		c.Seconds = time.Since(began).Seconds()
		if err != nil && ctx.Err() == nil {
			c.OK = false
			c.Checks = append(c.Checks, Assertion{What: part.Name, Want: "no error", Got: err.Error()})
		}
		s.report.Steps = append(s.report.Steps, c.Step)
		if err == nil {
			err = s.measureMemory()
		}
		if err != nil {
			return fmt.Errorf("step %d, %s: %w", i+1, part.Name, err)
		}
		s.say.took(c.Seconds)
	}
	return nil
}

func (s *story) playOne(ctx context.Context, c *chapter, part *Chapter) error {
	switch {
	case part.Start != nil:
		return s.begin(ctx, c, part.Start)
	case part.Call != nil:
		return s.call(ctx, c, part.Call)
	case part.Refuse != nil:
		return s.refuse(ctx, c, part.Refuse)
	case part.Lose != nil:
		return s.lose(ctx, c, part.Lose)
	case part.Endure != nil:
		return s.endure(ctx, c, part.Endure)
	default:
		return s.restore(ctx, c, part.Restore)
	}
}

// stop ends what still runs of the load.
func (s *story) stop() {
	for _, g := range s.groups {
		g.stop()
	}
}

func (s *story) measureMemory() error {
	m, n, err := s.memory()
	if err != nil {
		return err
	}
	if rss := mib(m.RSS); rss > s.report.RSSTotalMiB {
		s.report.RSSTotalMiB, s.report.PSSTotalMiB, s.report.Processes = rss, mib(m.PSS), n
	}
	return nil
}

func mib(bytes int64) float64 { return float64(bytes>>10) / 1024 }

// await looks again and again until done says true, or the time is over. The last
// look's state is what got said.
func await(ctx context.Context, within, every time.Duration, look func(context.Context) (done bool, got string, err error)) (ok bool, got string, err error) {
	bounded, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		done, now, err := look(bounded)
		switch {
		case ctx.Err() != nil:
			return false, now, ctx.Err()
		case bounded.Err() != nil && (err != nil || !done):
			if now != "" {
				got = now
			}
			return false, got + fmt.Sprintf(" (after %s)", within), nil
		case err != nil:
			return false, now, err
		case done:
			return true, now, nil
		}
		got = now
		select {
		case <-bounded.Done():
		case <-time.After(every):
		}
	}
}

func (s *story) begin(ctx context.Context, c *chapter, step *StartStep) error {
	bounded, cancel := context.WithTimeoutCause(ctx, step.Within, fmt.Errorf("it was not all up within %s", step.Within))
	defer cancel()
	if err := s.bringUp(bounded); err != nil {
		return err
	}
	for i := range s.spec.TrustDomains {
		if err := s.checkCA(ctx, c, &s.spec.TrustDomains[i]); err != nil {
			return err
		}
	}
	return s.checkIdentities(ctx, c, step.Within)
}

// checkCA: a domain's CA has a leader and all its voters, and every agent is attested.
func (s *story) checkCA(ctx context.Context, c *chapter, td *TrustDomain) error {
	node := s.find(kindCA, td.Name, td.CA[0])
	want := fmt.Sprintf("a leader, %d voters, %d agents", len(td.CA), len(td.Mesh))
	ok, got, err := await(ctx, 10*time.Second, statusEvery, func(ctx context.Context) (bool, string, error) {
		status, err := s.status(ctx, node)
		if err != nil {
			return false, "", err
		}
		leader, voters := "", 0
		for _, m := range status.GetMembers() {
			if m.GetVoterNow() {
				voters++
			}
			if m.GetMember().GetId() == status.GetLeaderId() {
				leader = m.GetMember().GetName()
			}
		}
		got := fmt.Sprintf("leader %s, %d voters, %d agents, %d entries, revision %s",
			orNone(leader), voters, status.GetAgents(), status.GetEntries(), ca.Revision(status.GetRevision()))
		return leader != "" && voters == len(td.CA) && int(status.GetAgents()) == len(td.Mesh), got, nil
	})
	if err != nil {
		return err
	}
	c.check(ok, "CA of "+td.Name, want, got)
	return nil
}

func orNone(name string) string {
	if name == "" {
		return "none"
	}
	return name
}

// checkIdentities asks every service process which SVIDs the Workload API gave it:
// one for each service it runs, verified by go-spiffe with the bundle beside it.
func (s *story) checkIdentities(ctx context.Context, c *chapter, within time.Duration) error {
	want := 0
	for _, u := range s.units {
		want += len(u.services)
	}
	ok, got, err := await(ctx, within, lookEvery, func(ctx context.Context) (bool, string, error) {
		held, err := s.world.identities(ctx, "")
		if err != nil {
			return false, "", err
		}
		have, missing := 0, ""
		for _, u := range s.units {
			for _, name := range u.services {
				if slices.ContainsFunc(held[u], func(i platform.Identity) bool { return i.ID == spiffeID(name) && i.Verified }) {
					have++
				} else if missing == "" {
					missing = ", not " + name + " in " + u.datacenter
				}
			}
		}
		return have == want, fmt.Sprintf("%d%s", have, missing), nil
	})
	if err != nil {
		return err
	}
	c.check(ok, "services that hold their verified SVID, as they see it at the Workload API", fmt.Sprint(want), got)
	return nil
}

// spiffeID is the ID of a service by its service name.
func spiffeID(service string) string {
	label, domain, _ := strings.Cut(service, ".")
	return "spiffe://" + domain + "/" + label
}

// answer is what came back to a request of the story.
type answer struct {
	status int
	header http.Header
	body   []byte
	err    error
}

func (a answer) reason() string { return a.header.Get("Entente-Refused") }

func (a answer) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	if reason := a.reason(); reason != "" {
		return fmt.Sprintf("%d %s", a.status, reason)
	}
	return fmt.Sprint(a.status)
}

// ask makes a request of the story, once.
func (s *story) ask(ctx context.Context, r *Request, subject string) answer {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if r.From == phone {
		tier := r.Tier
		if tier == "" {
			tier = "gold"
		}
		token, err := s.users.token(r.Token, subject, tier)
		if err != nil {
			return answer{err: err}
		}
		p := load.NewPhone(s.edges(r.Datacenter)[:1], s.roots(), token)
		defer p.Close()
		var body []byte
		if r.Method == http.MethodPost {
			body = order
		}
		a, _, _, err := p.Try(ctx, r.Method, r.URL, body)
		return answer{a.Status, a.Header, a.Body, err}
	}
	var called platform.Called
	u := s.server(r.From, r.Datacenter)
	if err := s.control(ctx, u, http.MethodPost, "/call", platform.CallOrder{As: r.From, Method: r.Method, URL: r.URL}, &called); err != nil {
		return answer{err: err}
	}
	if called.Error != "" {
		return answer{err: errors.New(called.Error)}
	}
	return answer{called.Status, called.Header, called.Body, nil}
}

func (s *story) call(ctx context.Context, c *chapter, step *CallStep) error {
	// The first call may come before the last push has arrived everywhere.
	var a answer
	ok, _, err := await(ctx, 5*time.Second, lookEvery, func(ctx context.Context) (bool, string, error) {
		a = s.ask(ctx, &step.Request, "storyteller")
		return a.err == nil && a.status == http.StatusOK, a.String(), nil
	})
	if err != nil {
		return err
	}
	if !c.check(ok, "GET "+step.Request.URL, "200", a.String()) {
		s.say.line("%s", a.body)
		return nil
	}
	var made platform.Answer
	if err := json.Unmarshal(a.body, &made); err != nil {
		return fmt.Errorf("the answer is no JSON: %w", err)
	}
	var figures map[string]any
	if err := json.Unmarshal(made.Data, &figures); err != nil {
		return fmt.Errorf("the answer's data is no JSON object: %w", err)
	}
	for _, name := range step.Shows {
		value, ok := figures[name]
		c.check(ok, name, "a figure", fmt.Sprint(value))
	}
	for _, seen := range step.Sees {
		caller, ok := callerSeenBy(made, seen.Service)
		c.check(ok && caller == "spiffe://"+seen.Caller, seen.Service+" was called by", "spiffe://"+seen.Caller, caller)
	}
	return s.checkLegs(ctx, c, step, a.header.Get("X-Request-Id"))
}

// callerSeenBy is the caller that a service in the answer was told of.
func callerSeenBy(a platform.Answer, service string) (string, bool) {
	if a.Service == service {
		return a.Caller, true
	}
	for _, source := range a.Sources {
		if caller, ok := callerSeenBy(source, service); ok {
			return caller, true
		}
	}
	return "(it was not asked)", false
}

// checkLegs reads the access records of every process on the request's way and
// compares the TLS legs with those that must be there.
func (s *story) checkLegs(ctx context.Context, c *chapter, step *CallStep, id string) error {
	var legs []tlsLeg
	_, _, err := await(ctx, recordsSettle, lookEvery, func(context.Context) (bool, string, error) {
		records, err := s.records(func(r *record) bool { return r.RequestID == id })
		if err != nil {
			return false, "", err
		}
		legs = legsOf(records, s.listener)
		complete := len(legs) >= len(step.Legs)
		for _, leg := range legs {
			complete = complete && leg.From != ""
		}
		return complete, "", nil
	})
	if err != nil {
		return err
	}
	s.say.line("request %s, each TLS leg as both of its ends recorded it:", id)
	for _, leg := range legs {
		server := "an address that is nobody's"
		if leg.Server != nil {
			server = leg.Server.name
		}
		s.say.line("  %-24s is %s", leg.Dialler.name, orNone(leg.From))
		s.say.line("    -mTLS-> %-14s is %s   for %s", server, leg.To, leg.Service)
	}
	for _, want := range step.Legs {
		found := slices.ContainsFunc(legs, func(l tlsLeg) bool { return l.From == "spiffe://"+want.From && l.To == "spiffe://"+want.To })
		got := "verified by both"
		if !found {
			got = "no such leg"
		}
		c.check(found, "TLS leg "+want.From+" -> "+want.To, "verified by both", got)
	}
	c.check(len(legs) == len(step.Legs), "TLS legs on the way", fmt.Sprint(len(step.Legs)), fmt.Sprint(len(legs)))
	return nil
}

func (s *story) refuse(ctx context.Context, c *chapter, list []Refusal) error {
	// All at the same time: each has its own client, and none waits for another.
	type outcome struct {
		ok   [2]bool
		want [2]string
		got  [2]string
	}
	outcomes := make([]outcome, len(list))
	var all sync.WaitGroup
	for i := range list {
		all.Go(func() {
			r, o := &list[i], &outcomes[i]
			var expect RefusedWith
			if r.Expect != nil {
				expect = *r.Expect
			}
			subject := fmt.Sprintf("refusal %d", i)
			o.ok[0], o.want[0], o.got[0] = s.attempt(ctx, Attempt{r.Pos, r.Call, r.Dial}, &expect, subject)
			o.ok[1], o.want[1], o.got[1] = s.attempt(ctx, r.Control, nil, subject+" control")
		})
	}
	all.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	for i, o := range outcomes {
		c.check(o.ok[0], list[i].Name, o.want[0], o.got[0])
		c.check(o.ok[1], "  control: "+describe(list[i].Control), o.want[1], o.got[1])
	}
	return nil
}

func describe(a Attempt) string {
	switch {
	case a.Dial != nil && a.Dial.As != "":
		return "the same dial as " + a.Dial.As
	case a.Dial != nil:
		return "the same dial as " + a.Dial.Forged
	case a.Call.From == phone && a.Call.Times > 1:
		return fmt.Sprintf("%d at once with tier %s", a.Call.Times, a.Call.Tier)
	case a.Call.From == phone:
		return "the same with a good token"
	default:
		return "the same as " + a.Call.From
	}
}

// attempt makes an attempt and compares: expect nil, it must be answered; else it must
// be refused that way.
func (s *story) attempt(ctx context.Context, a Attempt, expect *RefusedWith, subject string) (ok bool, want, got string) {
	if a.Dial != nil {
		dialled, err := s.dial(ctx, a.Dial)
		switch {
		case err != nil:
			return false, "a dial", err.Error()
		case expect == nil:
			return dialled.Accepted, "TLS accepts", dialled.Detail
		default:
			return dialled.ByTLS, "TLS refuses", dialled.Detail
		}
	}
	answers := make([]answer, a.Call.Times)
	var all sync.WaitGroup
	for i := range answers {
		all.Go(func() { answers[i] = s.ask(ctx, a.Call, subject) })
	}
	all.Wait()
	counts, good, refused := map[string]int{}, 0, 0
	for _, a := range answers {
		counts[a.String()]++
		switch {
		case a.err == nil && a.status == http.StatusOK:
			good++
		case expect != nil && a.err == nil && a.status == expect.Status && a.reason() == expect.Reason:
			refused++
		}
	}
	got = countsText(counts, len(answers))
	switch {
	case expect == nil && len(answers) == 1:
		return good == 1, "200", got
	case expect == nil:
		return good == len(answers), fmt.Sprintf("%d x 200", len(answers)), got
	case len(answers) == 1:
		return refused == 1, fmt.Sprintf("%d %s", expect.Status, expect.Reason), got
	default:
		// Over a rate: some are answered, the others refused, and nothing else.
		return refused > 0 && good > 0 && refused+good == len(answers), fmt.Sprintf("some 200, the others %d %s", expect.Status, expect.Reason), got
	}
}

func countsText(counts map[string]int, total int) string {
	var parts []string
	for _, key := range slices.Sorted(maps.Keys(counts)) {
		if total == 1 {
			return key
		}
		parts = append(parts, fmt.Sprintf("%d x %s", counts[key], key))
	}
	return strings.Join(parts, ", ")
}

func (s *story) dial(ctx context.Context, d *Dial) (platform.Dialled, error) {
	target := s.find(kindGateway, d.Gateway, d.Datacenter)
	name := "gateway." + d.Gateway
	if d.Sidecar != "" {
		target = s.find(kindAgent, d.Sidecar, d.Datacenter)
		// The name of a service that this sidecar serves, as a caller would ask for it.
		name = s.spec.domain(d.Sidecar).Services[0].Name + "." + d.Sidecar
	}
	if d.Forged != "" {
		certificate, err := forge(d.Forged)
		if err != nil {
			return platform.Dialled{}, err
		}
		return platform.Dial(ctx, target.door, name, certificate), nil
	}
	var dialled platform.Dialled
	order := platform.DialOrder{ID: spiffeID(d.As), Address: target.door, ServerName: name}
	err := s.control(ctx, s.server(d.As, d.Datacenter), http.MethodPost, "/dial", order, &dialled)
	return dialled, err
}

func (s *story) lose(ctx context.Context, c *chapter, step *LoseStep) error {
	for _, name := range step.Load {
		i := slices.IndexFunc(s.spec.Load, func(l Load) bool { return l.Name == name })
		g, err := s.startLoad(ctx, s.spec.Load[i])
		if err != nil {
			return err
		}
		s.groups = append(s.groups, g)
		s.say.line("load: %s, %s %s at %.0f/s, open loop, deadline %s", g.Name, g.Method, g.URL, g.Rate.PerSecond, g.Deadline)
	}
	if err := pause(ctx, step.Before); err != nil {
		return err
	}
	if err := s.noteSerials(ctx, step.Datacenter); err != nil {
		return err
	}
	victims := s.in(step.Datacenter)
	s.lost, s.lostAt = step.Datacenter, s.kill(victims...)
	s.say.line("SIGKILL to all %d processes of %s, in %s", len(victims), step.Datacenter, time.Since(s.lostAt).Round(10*time.Microsecond))
	if err := pause(ctx, step.After); err != nil {
		return err
	}
	s.lossEnd = time.Now()
	return s.checkLoss(ctx, c, step)
}

// pause waits.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// noteSerials remembers every service's SVID outside the datacenter that will be lost.
func (s *story) noteSerials(ctx context.Context, lost string) error {
	s.serials = map[string]string{}
	for _, dc := range s.spec.Datacenters {
		if dc.Name == lost {
			continue
		}
		held, err := s.world.identities(ctx, dc.Name)
		if err != nil {
			return err
		}
		for u, list := range held {
			for _, i := range list {
				s.serials[u.name+" "+i.ID] = i.Serial
			}
		}
	}
	return nil
}

// settled waits until every request that was due before a moment has been recorded,
// and returns the samples of each group.
func (s *story) settled(ctx context.Context, before time.Time) ([][]load.Sample, error) {
	all := make([][]load.Sample, len(s.groups))
	for i, g := range s.groups {
		ok, got, err := await(ctx, g.Deadline+time.Second, lookEvery, func(context.Context) (bool, string, error) {
			samples, err := g.recorded()
			all[i] = samples
			due, have := load.Due(samples, g.Rate.PerSecond, before)
			return have >= due, fmt.Sprintf("%d of %d", have, due), err
		})
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, fmt.Errorf("load %q has recorded only %s requests that were due", g.Name, got)
		}
	}
	return all, nil
}

// checkLoss measures what the loss cost and compares it with the limits.
func (s *story) checkLoss(ctx context.Context, c *chapter, step *LoseStep) error {
	all, err := s.settled(ctx, s.lossEnd)
	if err != nil {
		return err
	}
	to := s.survivor(step.Datacenter)
	records, err := s.records(func(r *record) bool { return r.Attempts > 1 })
	if err != nil {
		return err
	}
	extra := map[string]int{} // further attempts inside the mesh by request id
	for _, r := range records {
		extra[r.RequestID] += r.Attempts - 1
	}
	total := &s.report.Failover
	var latencies []time.Duration
	for i, g := range s.groups {
		samples := all[i]
		for j := range samples {
			samples[j].Attempts += extra[samples[j].RequestID]
		}
		r := load.Measure(samples, s.lostAt, s.lossEnd, to)
		total.add(g.Load, r)
		s.sayLoss(g, r, to)
		limits := step.Expect
		c.check(r.Before[g.ServedBy] > 0, g.Name+": good answers from "+g.ServedBy+" before the loss", "some", fmt.Sprint(r.Before[g.ServedBy]))
		c.check(r.After[to] > 0, g.Name+": good answers from "+to+" after it", "some", fmt.Sprint(r.After[to]))
		if !g.idempotent() {
			continue
		}
		latencies = append(latencies, load.Latencies(samples, s.lossEnd)...)
		c.check(r.Failed <= limits.Failed, g.Name+": requests without a good answer in their deadline", fmt.Sprintf("at most %d of %d", limits.Failed, r.Requests), fmt.Sprintf("%d%s", r.Failed, firstError(r.Errors)))
		if limits.LongestGap > 0 {
			c.check(r.LongestGap <= limits.LongestGap, g.Name+": longest gap between good answers", "at most "+limits.LongestGap.String(), milliseconds(r.LongestGap))
		}
		if limits.Switched > 0 {
			c.check(r.Switched >= 0 && r.Switched <= limits.Switched, g.Name+": from then on all answers good and from "+to, "within "+limits.Switched.String(), milliseconds(r.Switched))
		}
	}
	slices.Sort(latencies)
	total.P50MS, total.P99MS = inMS(load.Quantile(latencies, 0.50)), inMS(load.Quantile(latencies, 0.99))
	return nil
}

// survivor is the first datacenter with a mesh that is not lost.
func (s *story) survivor(lost string) string {
	for _, td := range s.spec.TrustDomains {
		for _, dc := range td.Mesh {
			if dc != lost {
				return dc
			}
		}
	}
	return ""
}

func (s *story) sayLoss(g *group, r load.Result, to string) {
	s.say.line("%s: %d requests, %d failed, %d attempts, %d outcomes unknown; longest gap %s; all from %s after %s; p50 %s, p99 %s",
		g.Name, r.Requests, r.Failed, r.Attempts, r.Unknown, milliseconds(r.LongestGap), to, milliseconds(r.Switched), milliseconds(r.P50), milliseconds(r.P99))
}

func firstError(errs map[string]int) string {
	for _, text := range slices.Sorted(maps.Keys(errs)) {
		return fmt.Sprintf(" (%d x %s)", errs[text], text)
	}
	return ""
}

func (s *story) endure(ctx context.Context, c *chapter, step *EndureStep) error {
	for _, name := range step.Quorum {
		if err := s.checkQuorum(ctx, c, s.spec.domain(name), step.Within); err != nil {
			return err
		}
	}
	if step.Renewed == "" {
		return nil
	}
	want := 0
	for _, u := range s.in(step.Renewed) {
		want += len(u.services)
	}
	ok, got, err := await(ctx, step.Within, statusEvery, func(ctx context.Context) (bool, string, error) {
		held, err := s.world.identities(ctx, step.Renewed)
		if err != nil {
			return false, "", err
		}
		renewed := 0
		for u, list := range held {
			for _, i := range list {
				before := s.serials[u.name+" "+i.ID]
				if before != "" && i.Serial != before && i.Verified && i.NotAfter.After(time.Now()) {
					renewed++
				}
			}
		}
		return renewed >= want, fmt.Sprintf("%d, %.1f s after the loss", renewed, time.Since(s.lostAt).Seconds()), nil
	})
	if err != nil {
		return err
	}
	c.check(ok, "services of "+step.Renewed+" that hold a newer SVID than at the loss", fmt.Sprint(want), got)
	return nil
}

// checkQuorum: a node that survived knows a leader that survived, and a majority of
// the voters runs.
func (s *story) checkQuorum(ctx context.Context, c *chapter, td *TrustDomain, within time.Duration) error {
	alive := slices.DeleteFunc(slices.Clone(td.CA), func(dc string) bool { return dc == s.lost })
	node := s.find(kindCA, td.Name, alive[0])
	ok, got, err := await(ctx, within, statusEvery, func(ctx context.Context) (bool, string, error) {
		status, err := s.status(ctx, node)
		if err != nil {
			return false, "", err
		}
		leader, voters, running := "", 0, 0
		for _, m := range status.GetMembers() {
			if !m.GetVoterNow() {
				continue
			}
			voters++
			survives := m.GetMember().GetDatacenter() != s.lost
			if survives {
				running++
			}
			if survives && m.GetMember().GetId() == status.GetLeaderId() {
				leader = m.GetMember().GetName()
			}
		}
		got := fmt.Sprintf("leader %s, %d of %d voters run, state %.1f s old", orNone(leader), running, voters, status.GetAgeSeconds())
		return leader != "" && 2*running > voters, got, nil
	})
	if err != nil {
		return err
	}
	c.check(ok, "CA of "+td.Name+" has a majority", "a leader outside "+s.lost, got)
	return nil
}

func (s *story) restore(ctx context.Context, c *chapter, step *RestoreStep) error {
	s.restoredAt = time.Now()
	bounded, cancel := context.WithTimeoutCause(ctx, step.Within, fmt.Errorf("%s was not up again within %s", step.Datacenter, step.Within))
	defer cancel()
	if err := s.upMesh(bounded, func(u *unit) bool { return u.datacenter == step.Datacenter }); err != nil {
		return err
	}
	up := time.Now()
	s.say.line("all %d processes of %s are ready again after %.1f s", len(s.in(step.Datacenter)), step.Datacenter, up.Sub(s.restoredAt).Seconds())
	for _, g := range s.groups {
		if g.ServedBy != step.Datacenter {
			continue
		}
		ok, got, err := await(ctx, step.Within, lookEvery, func(context.Context) (bool, string, error) {
			samples, err := g.recorded()
			back := load.Share(samples, s.restoredAt, step.Datacenter)
			return len(back) >= sharedAgain, shareText(back, samples, s.restoredAt), err
		})
		if err != nil {
			return err
		}
		c.check(ok, g.Name+": good answers that "+step.Datacenter+" alone made since", fmt.Sprintf("at least %d", sharedAgain), got)
	}
	end := time.Now()
	all, err := s.settled(ctx, end)
	if err != nil {
		return err
	}
	s.stop()
	for i, g := range s.groups {
		if !g.idempotent() {
			continue
		}
		samples := slices.DeleteFunc(all[i], func(x load.Sample) bool { return x.Scheduled.Before(s.lossEnd) })
		r := load.Measure(samples, s.restoredAt, end, step.Datacenter)
		c.check(r.Failed <= step.Expect.Failed, g.Name+": failed since, until and with the return", fmt.Sprintf("at most %d of %d", step.Expect.Failed, r.Requests), fmt.Sprintf("%d%s", r.Failed, firstError(r.Errors)))
	}
	s.groups = nil
	s.lost = ""
	return nil
}

// shareText says when the first came of those that are back, or who answers instead.
func shareText(back, samples []load.Sample, since time.Time) string {
	if len(back) > 0 {
		return fmt.Sprintf("%d, the first %.1f s after the restart began", len(back), back[0].Done.Sub(since).Seconds())
	}
	counts := map[string]int{}
	for _, sample := range samples {
		if sample.Scheduled.Before(since) {
			continue
		}
		if sample.OK {
			counts[strings.Join(sample.ServedBy, "+")]++
		} else {
			counts[sample.Error]++
		}
	}
	return "0; " + countsText(counts, -1)
}

func milliseconds(d time.Duration) string {
	if d < 0 {
		return "never"
	}
	return fmt.Sprintf("%.1f ms", inMS(d))
}

func inMS(d time.Duration) float64 {
	if d < 0 {
		return -1
	}
	return float64(d.Microseconds()) / 1000
}

// add puts a group's result into the sum.
func (f *Failover) add(l Load, r load.Result) {
	f.Groups = append(f.Groups, FailoverGroup{
		Name: l.Name, Requests: r.Requests, Failed: r.Failed,
		LongestGapMS: inMS(r.LongestGap), SwitchedMS: inMS(r.Switched),
		Attempts: r.Attempts, OutcomeUnknown: r.Unknown,
		P50MS: inMS(r.P50), P99MS: inMS(r.P99), MaxMS: inMS(r.Max),
		ServedBefore: r.Before, ServedAfter: r.After, Errors: r.Errors,
		Idempotent: l.idempotent(),
	})
	f.OutcomeUnknown += r.Unknown
	if !l.idempotent() {
		return
	}
	f.Requests += r.Requests
	f.Failed += r.Failed
	f.Attempts += r.Attempts
	f.LongestGapMS = max(f.LongestGapMS, inMS(r.LongestGap))
	if switched := inMS(r.Switched); switched < 0 || f.SwitchedMS < 0 {
		f.SwitchedMS = -1
	} else {
		f.SwitchedMS = max(f.SwitchedMS, switched)
	}
}
