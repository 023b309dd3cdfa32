package platform

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// programs are the services that do more than answer: those on the story's path.
var programs = map[string]func(*service, *http.ServeMux){
	"accounts":    accounts,
	"ledger":      ledger,
	"market-data": marketData,
	"portfolio":   portfolio,
	"orders":      orders,
}

// cents is an amount of money. It is written "12480.55".
type cents int64

func (c cents) String() string {
	sign := ""
	if c < 0 {
		sign, c = "-", -c
	}
	return fmt.Sprintf("%s%d.%02d", sign, c/100, c%100)
}

// MarshalText writes the amount in units.
func (c cents) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (c *cents) UnmarshalText(text []byte) error {
	whole, fraction, found := strings.Cut(strings.TrimPrefix(string(text), "-"), ".")
	units, err := strconv.ParseUint(whole, 10, 48)
	if err != nil || !found || len(fraction) != 2 {
		return fmt.Errorf("%q is no amount such as 12480.55", text)
	}
	rest, err := strconv.ParseUint(fraction, 10, 8)
	if err != nil {
		return fmt.Errorf("%q is no amount such as 12480.55", text)
	}
	*c = cents(units*100 + rest)
	if strings.HasPrefix(string(text), "-") {
		*c = -*c
	}
	return nil
}

// What the two products know of their customers.
var (
	cash = map[string]cents{"C-1042": 12_480_55, "C-2001": 310_00, "C-3377": 98_150_20}

	holds = map[string][]hold{"C-1042": {{"H-1", 250_00, "card authorization"}, {"H-2", 1_200_00, "order O-1"}}, "C-2001": {}}

	positions = map[string][]position{
		"C-1042": {{"ACME", 40}, {"GLOBEX", 25}},
		"C-2001": {{"INITECH", 3}},
		"C-3377": {{"ACME", 500}},
	}

	closing = map[string]cents{"ACME": 187_20, "GLOBEX": 519_74, "INITECH": 12_05}
)

// marginPercent is how much of a position's worth may be borrowed against it.
const marginPercent = 50

type hold struct {
	ID     string `json:"id"`
	Amount cents  `json:"amount"`
	Reason string `json:"reason"`
}

type position struct {
	Symbol   string `json:"symbol"`
	Quantity int64  `json:"quantity"`
}

type balance struct {
	Customer string `json:"customer"`
	Currency string `json:"currency"`
	Balance  cents  `json:"balance"`
}

type holdList struct {
	Customer string `json:"customer"`
	Holds    []hold `json:"holds"`
	Total    cents  `json:"total"`
}

type prices struct {
	At     time.Time        `json:"at"`
	Prices map[string]cents `json:"prices"`
}

type buyingPower struct {
	Customer    string     `json:"customer"`
	Currency    string     `json:"currency"`
	Cash        cents      `json:"cash"`
	Positions   []position `json:"positions"`
	Worth       cents      `json:"positions_worth"`
	Margin      cents      `json:"margin"`
	BuyingPower cents      `json:"buying_power"`
}

func accounts(s *service, mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/balance/{customer}", func(w http.ResponseWriter, r *http.Request) {
		customer := r.PathValue("customer")
		amount, ok := cash[customer]
		if !ok {
			s.fail(w, r, http.StatusNotFound, fmt.Errorf("no account of customer %q", customer))
			return
		}
		s.ok(w, r, balance{customer, "USD", amount})
	})
}

func ledger(s *service, mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/holds/{customer}", func(w http.ResponseWriter, r *http.Request) {
		customer := r.PathValue("customer")
		list, ok := holds[customer]
		if !ok {
			s.fail(w, r, http.StatusNotFound, fmt.Errorf("no ledger of customer %q", customer))
			return
		}
		answer := holdList{Customer: customer, Holds: list}
		for _, h := range list {
			answer.Total += h.Amount
		}
		s.ok(w, r, answer)
	})
}

func marketData(s *service, mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/prices", func(w http.ResponseWriter, r *http.Request) {
		now := time.Now().UTC()
		answer := prices{At: now, Prices: map[string]cents{}}
		for symbol := range strings.SplitSeq(r.URL.Query().Get("symbols"), ",") {
			last, ok := closing[symbol]
			if !ok {
				s.fail(w, r, http.StatusNotFound, fmt.Errorf("symbol %q is not traded here", symbol))
				return
			}
			answer.Prices[symbol] = last + cents(now.Unix()%7)*5 // it moves a little
		}
		s.ok(w, r, answer)
	})
}

func portfolio(s *service, mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/buying-power/{customer}", func(w http.ResponseWriter, r *http.Request) {
		customer := r.PathValue("customer")
		held, ok := positions[customer]
		if !ok {
			s.fail(w, r, http.StatusNotFound, fmt.Errorf("no portfolio of customer %q", customer))
			return
		}
		var symbols []string
		for _, p := range held {
			symbols = append(symbols, p.Symbol)
		}
		sources, err := s.askAll(r,
			"http://market-data.trading.example/v1/prices?symbols="+strings.Join(symbols, ","),
			"http://accounts.banking.example/v1/balance/"+customer)
		if err != nil {
			s.fail(w, r, http.StatusBadGateway, err)
			return
		}
		answer, err := power(customer, held, sources[0].Data, sources[1].Data)
		if err != nil {
			s.fail(w, r, http.StatusBadGateway, err)
			return
		}
		s.ok(w, r, answer, sources...)
	})
}

// power is cash plus what may be borrowed against the positions at the given prices.
func power(customer string, held []position, priceData, balanceData []byte) (buyingPower, error) {
	var at prices
	if err := json.Unmarshal(priceData, &at); err != nil {
		return buyingPower{}, fmt.Errorf("read the prices: %w", err)
	}
	var b balance
	if err := json.Unmarshal(balanceData, &b); err != nil {
		return buyingPower{}, fmt.Errorf("read the balance: %w", err)
	}
	answer := buyingPower{Customer: customer, Currency: b.Currency, Cash: b.Balance, Positions: held}
	for _, p := range held {
		price, ok := at.Prices[p.Symbol]
		if !ok {
			return buyingPower{}, fmt.Errorf("no price of %s", p.Symbol)
		}
		answer.Worth += price * cents(p.Quantity)
	}
	answer.Margin = answer.Worth * marginPercent / 100
	answer.BuyingPower = answer.Cash + answer.Margin
	return answer, nil
}

func orders(s *service, mux *http.ServeMux) {
	var count atomic.Int64
	ask := func(r *http.Request, customer string) ([]Answer, error) {
		return s.askAll(r, "http://ledger.banking.example/v1/holds/"+customer)
	}
	mux.HandleFunc("GET /v1/orders/{customer}", func(w http.ResponseWriter, r *http.Request) {
		sources, err := ask(r, r.PathValue("customer"))
		if err != nil {
			s.fail(w, r, http.StatusBadGateway, err)
			return
		}
		s.ok(w, r, map[string]any{"placed_here": count.Load()}, sources...)
	})
	mux.HandleFunc("POST /v1/orders", func(w http.ResponseWriter, r *http.Request) {
		var order struct {
			Customer string `json:"customer"`
			Symbol   string `json:"symbol"`
			Quantity int64  `json:"quantity"`
		}
		if err := json.NewDecoder(io.LimitReader(r.Body, 4<<10)).Decode(&order); err != nil || order.Quantity <= 0 {
			s.fail(w, r, http.StatusBadRequest, fmt.Errorf("an order has a customer, a symbol and a quantity above 0 (%v)", err))
			return
		}
		sources, err := ask(r, order.Customer)
		if err != nil {
			s.fail(w, r, http.StatusBadGateway, err)
			return
		}
		id := fmt.Sprintf("O-%s-%d", s.datacenter, count.Add(1))
		s.ok(w, r, map[string]any{"order": id, "symbol": order.Symbol, "quantity": order.Quantity, "state": "accepted"}, sources...)
	})
}

func (s *service) ok(w http.ResponseWriter, r *http.Request, data any, sources ...Answer) {
	encoded, err := json.Marshal(data)
	if err != nil {
		s.fail(w, r, http.StatusInternalServerError, err)
		return
	}
	a := s.answer(r, encoded)
	a.Sources = sources
	s.write(w, http.StatusOK, a)
}

func (s *service) fail(w http.ResponseWriter, r *http.Request, status int, err error) {
	a := s.answer(r, nil)
	a.Error = err.Error()
	s.write(w, status, a)
}

// askAll asks several services at the same time; one that does not answer fails all.
// It ends when whoever asked us gives up.
func (s *service) askAll(r *http.Request, urls ...string) ([]Answer, error) {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	answers := make([]Answer, len(urls))
	errs := make(chan error, len(urls))
	for i, url := range urls {
		go func() {
			var err error
			answers[i], err = s.ask(ctx, r, url)
			errs <- err
		}()
	}
	var failed []string
	for range urls {
		if err := <-errs; err != nil {
			failed = append(failed, err.Error())
		}
	}
	if failed != nil {
		slices.Sort(failed)
		return nil, fmt.Errorf("%s", strings.Join(failed, "; "))
	}
	return answers, nil
}
